"""A run as lines and bars on a terminal."""

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedpeft.report import RoundRecord, history


class Terminal:
    """One line per round, with a bar inside the round; the bar is left out where nobody watches."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, visible=False)
        self._rounds = 0
        self._done = 0
        self._began = time.monotonic()

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """One line of news."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, rounds: int) -> None:
        """How many rounds are still to come."""
        self._rounds, self._done, self._began = rounds, 0, time.monotonic()

    def work(self, what: str, total: int) -> None:
        """A new bar."""
        self._progress.reset(self._task, description=what, total=total, visible=True)

    def advance(self) -> None:
        """One step of the bar."""
        self._progress.advance(self._task)

    def round(self, record: RoundRecord, rounds: int) -> None:
        """The line of a round that is over."""
        self._done += 1
        self._progress.update(self._task, visible=False)
        left = (time.monotonic() - self._began) / self._done * (self._rounds - self._done)
        self.note(line(record, rounds) + (f"  {clock(left)} left" if left else ""))


def line(record: RoundRecord, rounds: int) -> str:
    """A round's record in one line: loss, accuracy, worst client, bytes, seconds, refused answers."""
    parts = [f"round {record.round:>{len(str(rounds))}}/{rounds}"]
    if record.train is None:
        parts.append("failed: too few answers")
    else:
        parts += _number("loss", record.train.loss, 4)
    if record.central is not None:
        parts += _number("test accuracy", record.central.accuracy, 3)
    if record.validation is not None:
        single = [x.accuracy for x in record.validation.clients.values() if x.accuracy is not None]
        parts += _number("clients' accuracy", record.validation.accuracy, 3)
        parts += _number("worst client", min(single, default=None), 3)
    parts.append(f"up {size(record.bytes_up)} down {size(record.bytes_down)}")
    parts.append(f"{record.seconds:.1f} s")
    if record.refused:
        parts.append(f"{len(record.refused)} refused")
    return "  ".join(parts)


def headline(folder: Path) -> Table:
    """The run's result beside its baselines: on the central test set, and on the clients' own rows."""
    found = history(folder)
    table = Table("", "test accuracy", "test loss", "clients' own: mean", "worst tenth", box=None, header_style="bold")
    rows = [(x.name, x.central, x.clients) for x in found.baselines.values()]
    if found.final is not None:
        rows.append(("federated", found.final.central, found.final.test.clients if found.final.test else {}))
        if found.final.tuned is not None:
            rows.append(("federated, tuned", None, found.final.tuned.clients))
    for name, central, clients in rows:
        own = sorted(x.accuracy for x in clients.values() if x.accuracy is not None)
        tenth = own[: -(-len(own) // 10)]
        numbers = (
            central and central.accuracy,
            central and central.loss,
            sum(own) / len(own) if own else None,
            sum(tenth) / len(tenth) if tenth else None,
        )
        table.add_row(name, *("-" if x is None else f"{x:.4f}" for x in numbers))
    return table


def words(value: object) -> list[str]:
    """A fact in lines of text: what is nested, a line each; large numbers of bytes for people."""
    if isinstance(value, Mapping):
        return [f"{k}: {line}" for k, x in value.items() for line in words(x)]
    return [size(value) if isinstance(value, int) and value >= 1_000_000 else str(value)]


def size(count: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def clock(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(what: str, value: float | None, digits: int) -> list[str]:
    return [] if value is None else [f"{what} {value:.{digits}f}"]
