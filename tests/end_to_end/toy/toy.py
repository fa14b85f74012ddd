"""A Flower app of the linear model: what the fleet is proved with, without torch.

Its run config has the keys of the real one: ``experiment`` (here a number of clients) and ``run``,
the folder to write to.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.serverapp import Grid

from fedpeft.flower import ClientStore, Participant, client_app, drive, evaluate, muster, server_app
from fedpeft.rounds import SumRound
from fedpeft.rules import FactorMean, ServerState, Task
from tests.flower.linear import RANK, participant

RULE = FactorMean(("a",), personalised=True)
SECONDS = 120.0


def build(settings: str, config: Mapping[str, bool | int | float | str]) -> Participant:
    return participant(rule=RULE, store=ClientStore(Path(settings)))


def main(grid: Grid, config: Mapping[str, bool | int | float | str]) -> None:
    clients, run = int(config["experiment"]), Path(str(config["run"]))
    fleet = muster(grid, RULE, str(run / "clients"), clients, SECONDS)
    assert fleet.start is not None
    state = ServerState(Task(fleet.start.spec), fleet.start)
    ranks = dict.fromkeys(range(clients), RANK)
    for _ in range(2):
        round = SumRound(state, ranks, clients, rule=RULE)
        drive(fleet, round, SECONDS)
        print("refused:", round.refused)  # the log is shown where the run fails
        state = round.result().state
    found = evaluate(fleet, state, ranks, dict.fromkeys(ranks, ("validation", "central")), SECONDS)
    loss = [found.answers[client][part].loss for client in ranks for part in ("validation", "central")]
    part = run / "adapter.part.npz"
    np.savez(part, loss=np.array(loss), **state.adapter.tensors())
    part.rename(run / "adapter.npz")


client = client_app(build)
server = server_app(main)
