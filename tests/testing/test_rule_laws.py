"""The laws catch wrong rules, each by its name; a rule of somebody else's is found, built and put to them."""

import importlib
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from typing_extensions import override

from fedpeft.adapters import Layout
from fedpeft.config import experiment
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.rules import FactorMean, FedEx, MeanRule, Rule
from fedpeft.rules.each import FactorList, mean
from fedpeft.testing import Law, rule_laws
from fedpeft.testing.laws import LAWS, TREES


@dataclass(frozen=True, slots=True)
class Sound(MeanRule):
    """FedIT again, in a few lines: the rules below each break one of them."""

    @override
    def layout(self, task):
        return task.spec.factors("ab") + task.spec.leaves

    @override
    def encode(self, update, task):
        return update.factors("ab", task.spec) | update.dense()

    @override
    def decode(self, mean, state):
        return state.next(state.adapter.moved(mean))


class SendsItsRank(Sound):
    """Encodes no more than the client has."""

    @override
    def encode(self, update, task):
        return {n: x - update.received.tensors()[n] for n, x in update.trained.tensors().items()}


class SendsValues(Sound):
    """Encodes what was trained, and not the change."""

    @override
    def encode(self, update, task):
        received = replace(update.received, dense={n: 0 * x for n, x in update.received.dense.items()})
        return replace(update, received=received).dense() | update.factors("ab", task.spec)

    @override
    def decode(self, mean, state):
        dense = {n: mean[n] - x for n, x in state.adapter.dense.items()}
        return state.next(state.adapter.moved(dict(mean) | dense))


class StepsTooFar(Sound):
    """Doubles the mean."""

    @override
    def decode(self, mean, state):
        return state.next(state.adapter.moved({n: 2 * x for n, x in mean.items()}))


class FirstWins(FactorList):
    """The answer of the client with the lowest number."""

    @override
    def decode(self, encodings, state):
        return state.next(state.adapter.moved(encodings[0][0]))


class Sums(FactorList):
    """A sum with weights that nobody divided by their sum."""

    @override
    def decode(self, encodings, state):
        change = mean(encodings, [n for n, _ in self.layout(state.task).shapes])
        total = sum(weight for _, weight in encodings)
        return state.next(state.adapter.moved({n: total * x for n, x in change.items()}))


class Counts(FactorList):
    """A mean that divides by one too many, as for a sample's variance."""

    @override
    def decode(self, encodings, state):
        change = mean(encodings, [n for n, _ in self.layout(state.task).shapes])
        share = len(encodings) / (len(encodings) + 1)
        return state.next(state.adapter.moved({n: share * x for n, x in change.items()}))


class CountsEachOnce(FactorList):
    """A mean of all alike, whatever their weights."""

    @override
    def decode(self, encodings, state):
        names = [n for n, _ in self.layout(state.task).shapes]
        return state.next(state.adapter.moved(mean([(x, 1.0) for x, _ in encodings], names)))


class Forgets(Sound):
    """Begins the next round with an empty memory."""

    @override
    def decode(self, mean, state):
        return replace(Sound.decode(self, mean, state), memory={})


class LosesTheTail(FedEx):
    """Has a tail of what the last round has missed, and of nothing before."""

    @override
    def decode(self, encodings, state):
        after = FedEx.decode(self, encodings, replace(state, tail={}))
        return replace(after, tail={**state.tail, **after.tail})


class WorksOnce(Sound):
    """Does something else as soon as it remembers anything."""

    @override
    def decode(self, mean, state):
        change = {n: x * (0.5 if "been" in state.memory else 1.0) for n, x in mean.items()}
        return Sound.decode(self, change, replace(state, memory={**state.memory, "been": np.ones(1)}))


class StaysInItsRound(Sound):
    """Does not count rounds."""

    @override
    def decode(self, mean, state):
        return replace(state, adapter=state.adapter.moved(mean))


class Widens(Sound):
    """Gives back fp64 whatever it was given."""

    @override
    def decode(self, mean, state):
        mine = state.adapter.tensors()
        return state.next(state.adapter.put({n: mine[n] + x for n, x in mean.items()}))


class Divides(Sound):
    """Divides by the norm of what is there, which may be zero."""

    @override
    def decode(self, mean, state):
        with np.errstate(all="ignore"):
            share = {n: np.linalg.norm(x) / np.linalg.norm(x) for n, x in state.adapter.tensors().items()}
        return state.next(state.adapter.moved({n: share[n] * x for n, x in mean.items()}))


class NotConstant(Sound):
    """Says that a never changes."""

    @override
    def constant(self, spec):
        return frozenset({"q/a"})


class SendsLess(Sound):
    """Never sends a client more than one direction."""

    @override
    def send(self, state, rank):
        return Rule.send(self, state, 1)


class InPlace(Sound):
    """Adds to the server's own arrays."""

    @override
    def decode(self, mean, state):
        for n, x in state.adapter.tensors().items():
            x += mean[n].astype(x.dtype)
        return state.next(state.adapter)


class Shuffles(FactorList):
    """Draws without a seed."""

    @override
    def decode(self, encodings, state):
        change = mean(encodings, [n for n, _ in self.layout(state.task).shapes])
        noise = np.random.default_rng().normal()  # what no rule may do
        return state.next(state.adapter.moved({n: (1 + 1e-12 * noise) * x for n, x in change.items()}))


@dataclass(frozen=True, slots=True)
class LayoutOfTheClient(Sound):
    """A layout that depends on what was shared with the client."""

    @override
    def layout(self, task):
        return Sound.layout(self, task) + (Layout((("more", (1,)),)) if task.shared else Layout(()))

    @override
    def encode(self, update, task):
        return dict(Sound.encode(self, update, task)) | ({"more": np.zeros(1)} if task.shared else {})

    @override
    def send(self, state, rank):
        sent = Rule.send(self, state, rank)
        return replace(sent, task=replace(sent.task, shared={"rank": np.ones(1)} if rank == 2 else {}))


BREAKS = {
    SendsItsRank: "the layout does not depend on the client",
    LayoutOfTheClient: "the layout does not depend on the client",
    SendsValues: "no change encodes to zero and leaves the model as it is",
    StepsTooFar: "one client gets its own update back",
    FirstWins: "which client did what changes nothing",
    Sums: "only the ratio of weights counts",
    Counts: "identical clients count as one",
    CountsEachOnce: "who has nearly all the weight decides",
    LosesTheTail: "the next round begins where this one ends",
    WorksOnce: "one client gets its own update back",
    Forgets: "the next round begins where this one ends",
    StaysInItsRound: "the next round begins where this one ends",
    Widens: "an adapter keeps its precision",
    Divides: "from b = 0 all numbers stay finite",
    NotConstant: "constants never change and no tensor is lost",
    SendsLess: "a client receives no more than its rank, and the tail",
    InPlace: "the same answers give the same state and stay as they are",
    Shuffles: "the same answers give the same state and stay as they are",
}


def broken(rule, **options):
    """The names of the laws that a rule breaks."""
    found = []
    for law in rule_laws(rule, **options):
        try:
            law()
        except (AssertionError, ValueError, ProtocolError):
            found.append(law.name)
    return found


@pytest.mark.parametrize("law", rule_laws(Sound()))
def test_a_sound_rule_keeps_every_law(law):
    law()


@pytest.mark.parametrize(("rule", "law"), BREAKS.items(), ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_rule_breaks_the_law_that_names_its_fault(rule, law):
    assert law in broken(rule())


def test_every_law_but_two_is_broken_by_some_wrong_rule():
    assert set(LAWS) - set(BREAKS.values()) == {TREES, "one client of a low rank gets its own update back"}


class OrderOfSums(Sound):
    """A mean rule that keeps count of something beside the sum."""

    calls = 0

    @override
    def encode(self, update, task):
        OrderOfSums.calls += 1
        return {n: x * (1 + 1e-3 * OrderOfSums.calls) for n, x in Sound.encode(self, update, task).items()}


def test_an_encoding_that_depends_on_when_it_is_made_breaks_the_law_of_trees():
    assert TREES in broken(OrderOfSums())


class TakesThemForAll(Sound):
    """Takes the directions of clients of a low rank for those of all."""

    @override
    def encode(self, update, task):
        sent = dict(Sound.encode(self, update, task))
        share = 3 / update.received.layers["q"].rank
        return {n: share * x for n, x in sent.items()}


def test_an_update_of_a_low_rank_that_is_scaled_breaks_the_law_of_low_ranks():
    assert "one client of a low rank gets its own update back" in broken(TakesThemForAll())
    assert "one client gets its own update back" not in broken(TakesThemForAll())


def test_laws_have_their_names_as_ids_and_can_be_left_out():
    laws = rule_laws(Sound())
    assert [x.name for x in laws] == list(LAWS)
    assert all(x.__name__ == x.name for x in laws)
    assert repr(laws[0]) == f"<law: {laws[0].name}>"
    name = "one client gets its own update back"
    assert name not in [x.name for x in rule_laws(Sound(), skip=(name,))]
    with pytest.raises(ValueError, match=r"^skip: no such laws: \['gravity'\]; there are \['the layout"):
        rule_laws(Sound(), skip=("gravity",))
    assert isinstance(laws[0], Law)


def test_a_rule_that_needs_each_update_has_all_laws_but_that_of_sums():
    assert set(LAWS) - {x.name for x in rule_laws(Counts())} == {TREES}


def test_counts_need_not_be_zero_where_nothing_has_changed():
    rule = FactorMean(owners=True)
    assert "no change encodes to zero and leaves the model as it is" in broken(rule)
    assert broken(rule, counts=("/lacks",)) == []


DATA = {"data": {"name": "wiki11"}}
PLUGIN = '''
from dataclasses import dataclass
from fedpeft.rules import MeanRule


@dataclass(frozen=True, slots=True)
class Halved(MeanRule):
    """Half of the mean, for this test."""

    share: float = 0.5

    def layout(self, task):
        return task.spec.factors("ab") + task.spec.leaves

    def encode(self, update, task):
        return update.factors("ab", task.spec) | update.dense()

    def decode(self, mean, state):
        return state.next(state.adapter.moved({n: self.share * x for n, x in mean.items()}))
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Another package with a rule, installed for as long as a test takes."""
    info = tmp_path / "halving-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halving\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fedpeft.rules]\nhalved = halving_rules:Halved\n")
    (tmp_path / "halving_rules.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("fedpeft.config.experiment")
    module._plugins.cache_clear()
    yield "halved"
    module._plugins.cache_clear()
    sys.modules.pop("halving_rules", None)


def test_a_rule_of_another_package_is_found_by_its_entry_point_and_put_to_the_laws(plugin):
    found = experiment(DATA | {"rule": {"name": plugin, "share": 1.0}})
    assert type(found.rule).__module__ == "halving_rules"
    assert found.settings["rule"] == {"name": "halved", "share": 1.0}
    assert broken(found.rule) == []
    halved = experiment(DATA | {"rule": {"name": plugin}})
    assert "one client gets its own update back" in broken(halved.rule)
    with pytest.raises(ConfigError, match=r"rule\.shares: no such key; did you mean share\? halved has share"):
        experiment(DATA | {"rule": {"name": plugin, "shares": 1.0}})


def test_without_the_package_its_rule_is_not_there():
    with pytest.raises(ConfigError, match=r"rule\.name: got 'halved'; want one of"):
        experiment(DATA | {"rule": {"name": "halved"}})
