"""Secure aggregation in a run's report: what it hides, whom it takes to be honest, and what it cost."""

from collections.abc import Mapping
from html import escape

from fedpeft.report.costs import amount
from fedpeft.report.sessions import SecureRecord
from fedpeft.report.strict import Json


def secured(label: Mapping[str, Json], rounds: list[SecureRecord]) -> str:
    """What a run's secure aggregation hides and costs, as HTML; "" for a run in the clear."""
    if not label:
        return ""
    where = (
        "<p><b>Simulated:</b> one process made all identities, so nothing here was hidden from it.</p>"
        if label.get("simulated")
        else ""
    )
    return (
        f"<h2>Secure aggregation: {escape(str(label.get('protocol', '')))}</h2>{where}"
        f"<p>Hides {escape(str(label.get('hides', '')))}. Stands against {_share(label.get('corrupt'))} of a round’s "
        f"clients corrupt and {_share(label.get('dropouts'))} lost.</p>"
        f"{_lines('Who must be trusted, and for what', label.get('trusts'))}"
        f"{_lines('What is not covered', label.get('misses'))}{_phases(rounds)}{_cut(rounds)}{_culprits(rounds)}"
    )


def _lines(title: str, items: Json) -> str:
    if not isinstance(items, list | tuple) or not items:
        return ""
    return f"<p><b>{title}</b></p><ul>{''.join(f'<li>{escape(str(x))}</li>' for x in items)}</ul>"


def _phases(rounds: list[SecureRecord]) -> str:
    names = list(dict.fromkeys(name for x in rounds for name in x.phases))
    rows = []
    for name in names:
        each = [x.phases[name] for x in rounds if name in x.phases]
        n = len(each)
        asked, answered = sum(x.asked for x in each), sum(x.answered for x in each)
        cells = (
            f"{asked / n:.1f}",
            f"{asked - answered:,}",
            amount(sum(x.bytes_up for x in each) / max(answered, 1)),
            amount(sum(x.bytes_down for x in each) / max(asked, 1)),
            f"{sum(x.seconds for x in each) / n:.2f}",
        )
        row = "".join(f'<td class="n">{x}</td>' for x in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>')
    if not rows:
        return ""
    heads = ("Asked, a round", "Lost, in all", "Up, a client", "Down, a client", "Seconds, a round")
    head = "".join(f'<th class="n">{x}</th>' for x in heads)
    return (
        f'<div class="wide"><table><thead><tr><th>Phase</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cut(rounds: list[SecureRecord]) -> str:
    cut, numbers = sum(x.cut for x in rounds), sum(x.numbers for x in rounds)
    if not numbers:
        return ""
    said = f"{100 * cut / numbers:.2g} % of the numbers that clients sent were cut at the ring’s range"
    more = "; a larger channel.range would keep them" if cut else ""
    return f'<p class="note">{said if cut else "No number was cut at the ring’s range"}{more}.</p>'


def _culprits(rounds: list[SecureRecord]) -> str:
    found = {client: why for x in rounds for client, why in x.culprits.items()}
    return _lines("Left out after cheating", [f"client {client}: {why}" for client, why in sorted(found.items())])


def _share(x: Json) -> str:
    return f"{100 * x:.0f} %" if isinstance(x, int | float) else "–"
