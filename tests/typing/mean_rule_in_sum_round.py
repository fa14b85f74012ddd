"""The twin of ``list_rule_in_sum_round.py`` that a type checker must accept: a mean rule."""

from fedpeft.rounds import Outcome, SumRound
from fedpeft.rules import FactorMean, ServerState


def right(state: ServerState) -> Outcome:
    machine = SumRound(state, {1: 4, 2: 8}, 1, rule=FactorMean())
    machine.close()
    return machine.result()
