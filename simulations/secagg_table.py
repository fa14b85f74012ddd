"""The study of secure aggregation as Markdown tables: what it reaches, and what each phase costs.

Run: python simulations/secagg_table.py SWEEP.toml RUNS_FOLDER

Bytes are of the whole run, all clients, all messages of training both ways; seconds are of one process that plays all
clients and the server, training included.
"""

import sys
from pathlib import Path
from statistics import mean

from rules_table import chosen, spread

from fedpeft.report import History, PhaseRecord
from fedpeft.sweep import read


def main(file: str, folder: str) -> None:
    found = chosen(read(Path(file)), Path(folder))
    heads = ("case", "accuracy", "clients in a sum", "rounds left out", "MB up", "MB down", "seconds a round")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for case, runs in found.items():
        cells = (
            spread([x.final.central.accuracy for x in runs if x.final and x.final.central], 3),
            f"{mean(len(r.survivors) for x in runs for r in x.rounds if r.survivors):.1f}",
            str(sum(not r.survivors for x in runs for r in x.rounds)),
            f"{mean(x.bytes_up for x in runs) / 1e6:.1f}",
            f"{mean(x.bytes_down for x in runs) / 1e6:.1f}",
            f"{mean(r.seconds_training or 0.0 for x in runs for r in x.rounds):.1f}",
        )
        print(f"| {' | '.join([case, *cells])} |")
    for case, runs in found.items():
        if any(r.secure for x in runs for r in x.rounds):
            phases(case, runs)


def phases(case: str, runs: list[History]) -> None:
    """What each phase of the sessions of one case cost, means over rounds and seeds."""
    each: dict[str, list[PhaseRecord]] = {}
    for record in (r.secure for x in runs for r in x.rounds if r.secure):
        for name, phase in record.phases.items():
            each.setdefault(name, []).append(phase)
    print(f"\n{case}:\n\n| phase | asked | lost | up, a client | down, a client | seconds |\n|{'---|' * 6}")
    for name, found in each.items():
        asked, answered = sum(x.asked for x in found), sum(x.answered for x in found)
        cells = (
            f"{asked / len(found):.1f}",
            f"{(asked - answered) / len(found):.1f}",
            amount(sum(x.bytes_up for x in found) / max(answered, 1)),
            amount(sum(x.bytes_down for x in found) / max(asked, 1)),
            f"{mean(x.seconds for x in found):.2f}",
        )
        print(f"| {' | '.join([name, *cells])} |")


def amount(size: float) -> str:
    """Bytes as text."""
    return f"{size:.0f} B" if size < 1000 else f"{size / 1e3:.3g} kB" if size < 1e6 else f"{size / 1e6:.3g} MB"


if __name__ == "__main__":
    main(*sys.argv[1:])
