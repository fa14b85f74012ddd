"""When a simulated device is there: windows of time, once or again and again."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, isfinite


@dataclass(frozen=True, slots=True)
class Availability:
    """Windows (from, to) in seconds, ascending and apart; each includes its start and not its end.

    period: after which they come again (never, if not set); shift: seconds by which all of them are later.
    """

    windows: tuple[tuple[float, float], ...]
    period: float | None = None
    shift: float = 0.0

    def window(self, time: float) -> tuple[float, float]:
        """The window that is open at this time, or else the next one; both ends infinite if there is none."""
        t = time - self.shift
        if self.period is None:
            found = next((x for x in self.windows if t < x[1]), (inf, inf))
            return found[0] + self.shift, found[1] + self.shift
        if self.windows[-1][1] - self.windows[0][0] >= self.period and len(self.windows) == 1:
            return -inf, inf
        cycle = floor(t / self.period)
        for k in (cycle - 1, cycle, cycle + 1):  # a window may reach into the next cycle
            for start, end in self.windows:
                if t < end + k * self.period:
                    return start + k * self.period + self.shift, end + k * self.period + self.shift
        raise AssertionError("one of the next cycle's windows ends after any time in this one")

    def is_open(self, time: float) -> bool:
        """Whether the device is there at this time."""
        return self.window(time)[0] <= time


ALWAYS = Availability(((-inf, inf),))


def every(windows: Sequence[Sequence[float]], period: float | None = None, shift: float = 0.0) -> Availability:
    """The availability of these windows, those that touch joined. Raises ValueError for what are no windows."""
    if not windows:
        raise ValueError("got no windows; want at least one (from, to)")
    for window in windows:
        if len(window) != 2 or not all(map(isfinite, window)) or not 0 <= window[0] < window[1]:
            raise ValueError(f"got {list(window)}; want pairs (from, to) with 0 <= from < to")
    joined: list[tuple[float, float]] = []
    for start, end in sorted((x[0], x[1]) for x in windows):
        if joined and start < joined[-1][1]:
            raise ValueError(f"got windows that overlap, at {start}; want them apart")
        if joined and start == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    if period is not None:
        if joined[-1][1] - joined[0][0] > period or joined[-1][0] >= period:
            raise ValueError(
                f"got windows from {joined[0][0]} to {joined[-1][1]}; want them within a period of {period}"
            )
        if len(joined) > 1 and joined[-1][1] - period == joined[0][0]:
            # The last one runs into the first one of the next cycle: one window across the border.
            (_, first_end), (last_start, _) = joined[0], joined[-1]
            joined = [*joined[1:-1], (last_start, first_end + period)]
    return Availability(tuple(joined), period, shift)
