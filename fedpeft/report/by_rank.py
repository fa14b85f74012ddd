"""Clients of different kinds side by side: of ranks, of runtimes, and the hostile ones."""

from collections.abc import Mapping
from html import escape
from typing import TypeVar

import numpy as np

from fedpeft.report.history import History
from fedpeft.report.plots import last_clients
from fedpeft.report.records import Score
from fedpeft.report.summary import Standing, setting, standing

_MOST_NAMED = 20

_Kind = TypeVar("_Kind", int, str)


def ranks(h: History) -> str:
    """A table of the clients by rank: how many, and how they fare at the end; HTML, or "" where they don't differ."""
    each = {client: x.rank for client, x in h.run.clients.items() if x.rank is not None}
    return _table(h, "rank", each, "at its own rank")


def runtimes(h: History) -> str:
    """A table of the clients by what they train with, as ``ranks``."""
    each = {client: x.runtime for client, x in h.run.clients.items() if x.runtime}
    return _table(h, "runtime", each, "on its own runtime")


def _table(h: History, kind: str, all: Mapping[int, _Kind], where: str) -> str:
    each = {client: x for client, x in all.items() if not h.run.clients[client].hostile}
    if len(set(each.values())) < 2:
        return ""
    ends = last_clients(h)
    others = any(x.hostile for x in h.run.clients.values())
    alone = h.baselines["local"].clients if "local" in h.baselines else {}
    rows = []
    for name in sorted(set(each.values())):
        mine = frozenset(client for client, x in each.items() if x == name)
        told, by_itself = _of(ends, mine), _of(alone, mine)
        cells = [f"{len(mine):,}", _share(told.mean), _share(told.worst), _loss(ends, mine)]
        cells += [_share(by_itself.mean)] if alone else []
        row = "".join(f'<td class="n">{x}</td>' for x in cells)
        rows.append(f'<tr><th scope="row" class="n">{escape(str(name))}</th>{row}</tr>')
    heads = [kind.title(), "Clients", "Mean client", "Worst tenth", "Mean loss"]
    heads += ["Mean client alone"] if alone else []
    head = "".join(f'<th class="n">{x}</th>' for x in heads)
    return (
        f"<h2>Clients by {kind}</h2><p>Accuracy on the clients’ own rows{', of the honest ones' if others else ''}"
        f"{f'; alone: each trains by itself, {where}' if alone else ''}.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def hostile(h: History) -> str:
    """A sentence that says who attacked, and how; "" where nobody did."""
    share = setting(h, "simulation.hostile.share")
    if not share:
        return ""
    some = [str(client) for client, x in h.run.clients.items() if x.hostile]
    attack, strength = setting(h, "simulation.hostile.attack"), setting(h, "simulation.hostile.strength")
    what = {"flip": "change turned round", "noise": "noise in place of a change"}.get(attack, attack)
    told = h.run.population <= len(h.run.clients)
    who = f"{len(some):,} of {h.run.population:,} clients" if told else f"{100 * float(share):g} % of the clients"
    named = f" ({', '.join(some)})" if told and len(some) <= _MOST_NAMED else ""
    return (
        f" {who}{named} {'was' if told and len(some) == 1 else 'were'} hostile and sent "
        f"{'its' if told and len(some) == 1 else 'their'} {what}, times {float(strength):g}. "
        f"All scores of clients are of the others."
    )


def _of(scores: Mapping[int, Score], clients: frozenset[int]) -> Standing:
    return standing("", "", None, {client: x for client, x in scores.items() if client in clients})


def _loss(scores: Mapping[int, Score], clients: frozenset[int]) -> str:
    """The mean of their losses, each counting the same."""
    found = [x.loss for client, x in scores.items() if client in clients and x.loss is not None]
    return f"{np.mean(found):.3f}" if found else "–"


def _share(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.1f} %"
