"""The laws of aggregation rules, to put any rule to."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from fedpeft.rules import MeanRule, Rule
from fedpeft.testing import checks
from fedpeft.testing.checks import Case, Start
from fedpeft.testing.cohorts import start

TREES = "any order and any tree of sums gives the same state"
LAWS: Mapping[str, Callable[[Case], None]] = {
    "the layout does not depend on the client": checks.layout,
    TREES: checks.trees,
    "which client did what changes nothing": checks.order_of_clients,
    "only the ratio of weights counts": checks.ratio_of_weights,
    "who has nearly all the weight decides": checks.weight,
    "no change encodes to zero and leaves the model as it is": checks.no_change,
    "one client gets its own update back": checks.identity,
    "one client of a low rank gets its own update back": checks.identity_of_low_ranks,
    "identical clients count as one": checks.identical_clients,
    "from b = 0 all numbers stay finite": checks.from_zero,
    "constants never change and no tensor is lost": checks.constants,
    "the next round begins where this one ends": checks.next_round,
    "an adapter keeps its precision": checks.precision,
    "a client receives no more than its rank, and the tail": checks.received,
    "the same answers give the same state and stay as they are": checks.same_again,
}
"""Every law by its name."""


@dataclass(frozen=True, slots=True, repr=False)
class Law:
    """One law for one rule. Called, it raises AssertionError where the rule breaks it, with numbers.

    What the rule itself or the round raises comes through: a ValueError or a ProtocolError is a broken law too.
    """

    name: str
    check: Callable[[], None]

    def __call__(self) -> None:
        self.check()

    @property
    def __name__(self) -> str:
        """What pytest calls the test."""
        return self.name

    @override
    def __repr__(self) -> str:
        return f"<law: {self.name}>"


def rule_laws(
    rule: Rule, counts: tuple[str, ...] = (), skip: Collection[str] = (), begin: Start = start
) -> tuple[Law, ...]:
    """Every law that a rule of averages must keep, to call one by one::

        @pytest.mark.parametrize("law", rule_laws(MyRule()))
        def test_my_rule(law):
            law()

    counts: ends of the names of encoded tensors that are no change, such as a weight, and so need not be zero where
    nothing has changed; skip: names of laws that the rule breaks on purpose; begin: the state that rounds begin
    with, for a rule that needs more than an adapter. Raises ValueError for a law to skip that there isn't.
    """
    found = {name: partial(check, Case(rule, counts, begin)) for name, check in LAWS.items()}
    unknown = sorted(set(skip) - set(found))
    if unknown:
        raise ValueError(f"skip: no such laws: {unknown}; there are {list(found)}")
    if not isinstance(rule, MeanRule):
        del found[TREES]
    return tuple(Law(name, check) for name, check in found.items() if name not in skip)
