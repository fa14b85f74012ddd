"""The section of a report about the memory of devices: foretold, and measured."""

from collections.abc import Iterable, Sequence
from html import escape

from fedpeft.report.costs import amount
from fedpeft.report.devices import DeviceRecord, MemoryRecord

_MORE = 1.10
"""Measured over predicted above which a device is named: the plan's formula is good to 10 %."""

_MOST_NAMED = 6
_FORMULA = (
    "Predicted: by the formula of <code>fedpeft plan</code>, for a process that does nothing but train at this rank"
)


def devices(found: MemoryRecord | None) -> str:
    """Predicted beside measured memory, alike devices in one row; HTML, or "" where nothing was recorded."""
    if found is None or not (found.devices or found.unknown):
        return ""
    measured = any(x.measured is not None for x in found.devices)
    parts = ["<h2>Memory of devices</h2>"]
    if found.processes:
        parts.append(_simulated(found.processes))
    elif found.devices:
        parts.append(
            f"<p>{_FORMULA}, and what Flower’s client takes beside. Measured: the peak of the process that trained, as "
            f"the device’s own system counted it.</p>"
        )
    if said := exceeded(found):
        parts.append(f'<p class="notice">{escape(said)}</p>')
    if found.devices:
        parts.append(_table(found.devices, measured))
    if found.unknown:
        parts.append(f'<p class="note">{escape(_unknown(found.unknown))}</p>')
    return "".join(parts)


def exceeded(found: MemoryRecord) -> str:
    """A sentence on the device that took most above what was foretold by over 10 %, or above its budget; "" if none."""
    over = [x for x in found.devices if (x.ratio or 0.0) > _MORE or _is_over_budget(x)]
    if not over:
        return ""
    worst = max(over, key=lambda x: (x.ratio or 0.0, x.measured or 0))
    measured = worst.measured or 0
    said = f"Client {worst.clients[0]} ({_runtime(worst)}, rank {worst.rank}) took {amount(measured)} at its peak"
    if worst.ratio is not None:
        said += f", {worst.ratio:.2f} times the {amount(worst.predicted or 0)} that were foretold"
    if _is_over_budget(worst):
        said += f"{' and' if worst.ratio is not None else ','} more than its budget of {amount(worst.budget or 0)}"
    others = len(over) - 1
    more = f"; {others:,} more took more than was foretold or than their budget" if others else ""
    return f"{said}{more}."


def _is_over_budget(x: DeviceRecord) -> bool:
    return x.measured is not None and x.budget is not None and x.measured > x.budget


def _simulated(processes: Sequence[tuple[str, int]]) -> str:
    """What can be said of memory where all clients share a machine's processes."""
    (_, whole), *workers = processes
    beside = ""
    if workers:
        most = amount(max(size for _, size in workers))
        beside = f", and its {len(workers):,} worker process{'' if len(workers) == 1 else 'es'} {most}"
        beside += " each at most" if len(workers) > 1 else ""
    return (
        f"<p>{_FORMULA}. Nothing was measured on a device: the clients were simulated, and the process that stood "
        f"for all of them, with the server and the evaluation, took <b>{amount(whole)}</b> at its peak{beside}.</p>"
    )


def _table(found: Sequence[DeviceRecord], measured: bool) -> str:
    """Alike devices are those of one runtime, rank and budget."""
    alike: dict[tuple[int, str, int], list[DeviceRecord]] = {}
    for x in found:
        alike.setdefault((x.rank, _runtime(x), x.budget or 0), []).append(x)
    budgets, gpus = any(x.budget for x in found), any(x.gpu is not None for x in found)
    heads = ["Clients", "Rank", "Runtime", *(["Budget"] if budgets else []), "Predicted"]
    heads += ["Measured", "Measured / predicted"] if measured else []
    heads += ["On GPUs"] if gpus else []
    rows = []
    for (rank, runtime, budget), some in sorted(alike.items()):
        ratios = sorted(x.ratio for x in some if x.ratio is not None)
        cells = [str(rank), runtime, *([amount(budget) if budget else "–"] if budgets else [])]
        cells += [_range(x.predicted for x in some)]
        cells += [_range(x.measured for x in some), _between([f"{x:.2f}" for x in ratios])] if measured else []
        cells += [_range(x.gpu for x in some)] if gpus else []
        row = "".join(f"<td{'' if x == runtime else ' class=n'}>{escape(x)}</td>" for x in cells)
        rows.append(f'<tr><th scope="row">{_named([c for x in some for c in x.clients])}</th>{row}</tr>')
    head = "".join(f"<th{'' if x in ('Clients', 'Runtime') else ' class=n'}>{x}</th>" for x in heads)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _named(clients: Sequence[int]) -> str:
    """A few clients by number, and many by how many they are."""
    if len(clients) > _MOST_NAMED:
        return f"{len(clients):,} clients"
    return f"client{'' if len(clients) == 1 else 's'} {', '.join(map(str, sorted(clients)))}"


def _runtime(x: DeviceRecord) -> str:
    return x.runtime if x.quantise == "none" else f"{x.runtime} {x.quantise}"


def _range(sizes: Iterable[int | None]) -> str:
    return _between([amount(x) for x in sorted(x for x in sizes if x is not None)])


def _between(told: Sequence[str]) -> str:
    """The first and the last of some, where these differ."""
    if not told:
        return "–"
    return told[0] if told[0] == told[-1] else f"{told[0]} to {told[-1]}"


def _unknown(found: Sequence[tuple[int, str]]) -> str:
    reasons: dict[str, list[int]] = {}
    for client, why in found:
        reasons.setdefault(why, []).append(client)
    most = sorted(reasons.items(), key=lambda x: (-len(x[1]), x))
    told = [f"{_named(some)} ({why})" for why, some in most[:_MOST_NAMED]]
    if rest := sum(len(some) for _, some in most[_MOST_NAMED:]):
        told.append(f"{rest:,} more, for other reasons")
    return f"Not known: {'; '.join(told)}."
