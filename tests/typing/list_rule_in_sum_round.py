"""A type checker must refuse this file: a rule that needs each update by itself, on a round that keeps only sums."""

from fedpeft.rounds import Outcome, SumRound
from fedpeft.rules import Median, ServerState


def wrong(state: ServerState) -> Outcome:
    machine = SumRound(state, {1: 4, 2: 8}, 1, rule=Median())
    machine.close()
    return machine.result()
