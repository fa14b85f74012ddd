"""Rules with parts that stay on the client: what is sent, what is kept, which parts can't be."""

import re
from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Spec, Update
from fedpeft.errors import ConfigError
from fedpeft.rules import (
    FactorMean,
    FedEx,
    FedKSeed,
    FedSB,
    FlexLoRA,
    HetLoRA,
    LoRAA2,
    MeanRule,
    Median,
    PersonalList,
    PersonalMean,
    Rule,
    Scaffold,
    Subspace,
    Task,
    ZeroPad,
    personal,
)
from fedpeft.rules.personal import chosen
from fedpeft.testing import rule_laws
from tests.laws.cohorts import (
    COUNTS,
    FEDIT,
    FEDSA,
    FFA,
    RBLA,
    ROLORA,
    SKIPPED,
    cohort,
    computed,
    play,
    start,
    task_of,
    train,
)

SPEC = start().task.spec
DENSE = ("head", "bias", "gate")
NAMES = ("q/a", "q/b", "v/a", "v/b", *DENSE)

WRAPPED: dict[str, Rule] = {
    "fedit, a layer and a leaf": personal(FEDIT, ("v/*", "head")),
    "fedit, b": personal(FEDIT, ("*/b",)),
    "ffa, leaves": personal(FFA, DENSE),
    "ffa, b of one layer": personal(FFA, ("q/b",)),
    "rolora, a": personal(ROLORA, ("*/a", "gate")),
    "rbla, b": personal(RBLA, ("v*/b",)),
    "fedsa, a layer": personal(FEDSA, ("q/*",)),
    "zeropad, a layer": personal(ZeroPad(), ("q/*",)),
    "subspace, a layer": personal(Subspace(seed=5), ("q/?", "bias")),
    "flexlora, a layer": personal(FlexLoRA(), ("v/*",)),
    "fedex, all layers but one": personal(FedEx(), ("[p-u]/*", "bias")),
    "median, leaves": personal(Median(), ("head",)),
}
LAWS = [
    pytest.param(law, id=f"{name}: {law.name}")
    for name, rule in WRAPPED.items()
    for law in rule_laws(rule, COUNTS, SKIPPED.get(name.partition(",")[0], ()))
]
each_wrapped = pytest.mark.parametrize("rule", WRAPPED.values(), ids=WRAPPED)


@pytest.mark.parametrize("law", LAWS)
def test_a_rule_with_personal_parts_keeps_the_law(law):
    law()


@pytest.mark.parametrize(
    ("rule", "tensors", "sent", "kept"),
    [
        (FEDIT, ("v/*", "head"), ["q/a", "q/b", "bias", "gate"], {"v/a", "v/b", "head"}),
        (FEDIT, ("*/b",), ["q/a", "v/a", *DENSE], {"q/b", "v/b"}),
        (FFA, DENSE, ["q/b", "v/b"], set(DENSE)),
        (FFA, ("q/*",), ["v/b", *DENSE], {"q/a", "q/b"}),
        (FEDSA, ("q/*",), ["v/a"], {"q/a", "q/b", "v/b", *DENSE}),
        (RBLA, ("v/b",), ["q/a", "q/b", "v/a", "q/lacks", "v/lacks", *DENSE], {"v/b"}),
        (FlexLoRA(), ("v/a", "v/b"), ["q/a", "q/b", *DENSE], {"v/a", "v/b"}),
        (Median(), ("?ate", "b*"), ["q/a", "q/b", "v/a", "v/b", "head"], {"bias", "gate"}),
    ],
    ids=lambda x: repr(sorted(x)) if isinstance(x, set) else repr(x),
)
def test_what_stays_is_not_sent_and_the_rest_is_as_before(rule, tensors, sent, kept):
    mine, state = personal(rule, tensors), start()
    shapes = dict(rule.layout(state.task).shapes)
    assert mine.layout(state.task).shapes == tuple((n, shapes[n]) for n in sent)
    assert mine.personal(SPEC) == kept
    [(update, _)] = cohort(mine, state, ranks=(2,)).values()
    got, want = mine.encode(update, task_of(mine, state)), rule.encode(update, state.task)
    assert set(got) == set(sent)
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name])


def test_what_stays_is_constant_on_the_server_and_so_is_what_the_rule_never_changes():
    assert personal(FFA, ("q/*",)).constant(SPEC) == {"q/a", "q/b", "v/a"}
    assert personal(FEDIT, ("gate",)).constant(SPEC) == {"gate"}


def test_fedsa_is_fedit_whose_b_and_leaves_stay():
    mine, state = personal(FEDIT, ("*/b", *DENSE)), start()
    assert mine.layout(state.task) == FEDSA.layout(state.task)
    assert mine.personal(SPEC) == FEDSA.personal(SPEC)
    assert mine.constant(SPEC) == FEDSA.constant(SPEC)
    assert mine.trains(state.task) == FEDSA.trains(state.task) == "ab"
    clients = cohort(mine, state)
    got, want = (play(rule, state, clients).state.adapter.tensors() for rule in (mine, FEDSA))
    for name in NAMES:
        np.testing.assert_array_equal(got[name], want[name])


@each_wrapped
def test_what_is_shared_comes_out_as_if_the_rest_were_not_there(rule):
    """Under the rule inside, on adapters without what stays; but single factors, whose layer is there."""
    state = start()
    hidden = chosen(rule.tensors, SPEC)
    clients = cohort(rule, state, ranks=(3, 1, 2))

    def less(x: Adapter) -> Adapter:
        layers = {n: y for n, y in x.layers.items() if not {f"{n}/a", f"{n}/b"} <= hidden}
        return replace(x, layers=layers, dense={n: y for n, y in x.dense.items() if n not in hidden})

    small = replace(state, adapter=less(state.adapter))
    small = replace(small, task=Task(small.adapter.spec))
    few = {i: (Update(less(u.received), less(u.trained)), w) for i, (u, w) in clients.items()}
    want = play(rule.rule, small, few, ranks={10: 3, 11: 1, 12: 2}).state
    got = play(rule, state, clients, ranks={10: 3, 11: 1, 12: 2}).state
    before = state.adapter.tensors()
    for name, x in got.adapter.tensors().items():
        np.testing.assert_array_equal(x, before[name] if name in hidden else want.adapter.tensors()[name])
    assert got.tail.keys() == want.tail.keys()
    assert got.memory.keys() == want.memory.keys()
    assert list(got.adapter.layers) == ["q", "v"]
    assert got.task.spec is state.task.spec


@each_wrapped
def test_what_a_rule_says_of_itself_stays(rule):
    inside, task = rule.rule, start(round=1).task
    assert isinstance(rule, PersonalList if isinstance(inside, FlexLoRA | FedEx | Median) else PersonalMean)
    assert rule.passes == inside.passes
    assert rule.tells_factors is inside.tells_factors
    assert rule.trains(task) == inside.trains(task)
    assert rule.needs_sgd is inside.needs_sgd
    assert rule.hides_ranks is inside.hides_ranks
    assert rule.pool is inside.pool is None
    if isinstance(rule, PersonalMean):
        assert rule.is_change is inside.is_change


def test_every_question_that_a_rule_is_asked_is_passed_on():
    """So that a rule that answers it otherwise than by default still does with personal parts."""
    for base, mine in ((Rule, PersonalMean), (MeanRule, PersonalMean)):
        asked = {n for n, x in vars(base).items() if not n.startswith("_") and (callable(x) or isinstance(x, property))}
        own = {n for cls in mine.__mro__[:2] for n in vars(cls)}
        assert asked <= own


class Spy(FactorMean):
    """Notes which layers and leaves it is shown with each question."""

    def __init__(self):
        FactorMean.__init__(self)
        object.__setattr__(self, "shown", {})

    def _note(self, what, *given):
        for x in given:
            layers = [y.name for y in x.layers] if isinstance(x, Spec) else list(x.layers)
            self.shown.setdefault(what, set()).add((*layers, *(dict(x.dense))))

    def trains(self, task):
        self._note("trains", task.spec)
        return "ab"

    def personal(self, spec):
        self._note("personal", spec)
        return frozenset()

    def constant(self, spec):
        self._note("constant", spec)
        return frozenset()

    def layout(self, task):
        self._note("layout", task.spec)
        return FactorMean.layout(self, task)

    def encode(self, update, task):
        self._note("encode", task.spec, update.received, update.trained)
        return FactorMean.encode(self, update, task)

    def objective(self, task, start, own):
        self._note("objective", task.spec, start)
        return FactorMean.objective(self, task, start, own)

    def begin(self, received, own):
        self._note("begin", received)
        return received

    def keep(self, update, task, own):
        self._note("keep", task.spec, update.received, update.trained)
        return {"mine": np.ones(1)}

    def send(self, state, rank):
        self._note("send", state.task.spec, state.adapter)
        return FactorMean.send(self, state, rank)

    def is_for(self, sent, rank):
        self._note("is_for", sent.task.spec, sent.adapter)
        return FactorMean.is_for(self, sent, rank)

    def is_nested(self, ranks, spec):
        self._note("is_nested", spec)
        return False

    def between(self, mean, state):
        self._note("between", state.task.spec, state.adapter)
        return mean

    def decode(self, mean, state):
        self._note("decode", state.task.spec, state.adapter)
        return FactorMean.decode(self, mean, state)


def test_with_no_question_is_the_rule_shown_what_stays():
    spy, state = Spy(), start()
    rule = personal(spy, ("q/*", "bias"))
    [(update, _)] = cohort(rule, state, ranks=(2,)).values()
    play(rule, state, {1: (update, 1.0)})
    rule.objective(state.task, update.received, {})
    assert rule.begin(update.received, {}).layers.keys() == {"q", "v"}
    assert rule.keep(update, state.task, {}).keys() == {"mine"}
    assert rule.between({"q/x": np.ones(1)}, state).keys() == {"q/x"}
    rule.constant(SPEC), rule.personal(SPEC)
    assert [rule.is_for(rule.send(state, 2), rank) for rank in (1, 2)] == [False, True]
    assert not rule.is_nested([1, 2], SPEC)
    questions = {n for base in (Rule, MeanRule) for n, x in vars(base).items() if not n.startswith("_") and callable(x)}
    assert spy.shown == {question: {("v", "head", "gate")} for question in questions}


def test_a_rule_without_personal_parts_is_itself():
    assert personal(FEDIT, ()) is FEDIT


def test_the_rest_of_a_layer_that_stays_is_run_frozen():
    state = start()
    sent = personal(FEDIT, ("v/*",)).send(state, 1)
    assert [x.rank for x in sent.adapter.layers.values()] == [1, 1]
    assert list(sent.adapter.layers) == ["q", "v"]
    assert (sent.tail["q"].rank, sent.tail["v"].rank) == (2, 1)
    for name, x in computed(state).items():
        np.testing.assert_allclose(computed(sent)[name], x, atol=1e-12)
    assert personal(FactorMean(rest="dropped"), ("v/*",)).send(state, 1).tail.keys() == {"v"}


def test_a_rule_that_needs_some_rounds_needs_them_still():
    assert personal(FedSB(), ("head",)).fewest_rounds == FedSB().fewest_rounds > 1


def test_scaffold_keeps_its_variates_for_what_is_shared_alone():
    rule, state = personal(Scaffold(), ("v/*", "head")), start()
    assert rule.needs_sgd
    update = replace(train(rule, rule.send(state, 3), np.random.default_rng(0)), travel=0.5)
    own = rule.keep(update, state.task, {})
    assert set(own) == {f"control/{n}" for n in ("q/a", "q/b", "bias", "gate")}
    shift = rule.objective(state.task, state.adapter, own).shift
    assert set(shift) == {"q/a", "q/b", "bias", "gate"}
    np.testing.assert_array_equal(shift["q/a"], -own["control/q/a"])


def test_a_rank_that_a_client_kept_by_the_rule_is_of_the_shared_layers():
    rule, received = personal(HetLoRA(), ("v/*",)), start().adapter
    got = rule.begin(received, {"q/rank": np.array(1.0), "v/rank": np.array(1.0)})
    assert [x.rank for x in got.layers.values()] == [1, 2]
    assert personal(HetLoRA(gamma=0.5), ("v/*",)).objective(start().task, received, {}).cuts == {"q": 1}
    assert got.dense.keys() == received.dense.keys()


def test_what_a_rule_fixes_arrives_with_its_layers():
    class Fixing(FactorMean):
        def send(self, state, rank):
            sent = FactorMean.send(self, state, rank)
            return replace(sent, adapter=replace(sent.adapter, fixed={"drawn": np.arange(2)}))

    assert list(personal(Fixing(), ("v/*",)).send(start(), 2).adapter.fixed) == ["drawn"]


def test_names_are_compared_whole_and_after_each_dot():
    layers = {f"base.layer.{i}.query": LowRank(np.ones((2, 3)), np.ones((4, 2)), 1.0) for i in (1, 11)}
    spec = Adapter(layers, {"base.classifier.weight": np.ones(3)}).spec
    every = {f"base.layer.{i}.query/{p}" for i in (1, 11) for p in "ab"}
    for tensors, want in (
        (("classifier*",), {"base.classifier.weight"}),
        (("layer.1.*",), {"base.layer.1.query/a", "base.layer.1.query/b"}),
        (("*.layer.1.*",), {"base.layer.1.query/a", "base.layer.1.query/b"}),
        (("base.layer.11.query/a",), {"base.layer.11.query/a"}),
        (("query/?",), every),
        (("query/b", "1.query/a"), {"base.layer.1.query/a", "base.layer.1.query/b", "base.layer.11.query/b"}),
    ):
        assert personal(FEDIT, tensors).personal(spec) == want


@pytest.mark.parametrize(
    ("rule", "tensors", "message"),
    [
        (FEDIT, ("haed",), "'haed' names no tensor; the nearest are head, [^,]+, [^,]+$"),
        (FEDIT, ("head", "x/*"), "'x/\\*' names no tensor; the nearest are [qv]/[ab], "),
        (FEDIT, ("Head",), "'Head' names no tensor"),
        (FEDIT, ("*",), "got \\*, which leaves nothing for the clients to share; name fewer"),
        (FFA, ("*/b", *DENSE), "got \\*/b, head, bias, gate, which leaves nothing"),
        (FEDSA, ("*/a",), "got \\*/a, which leaves nothing"),
        (FlexLoRA(), ("q/b",), "q/b is one factor of a layer, and rule.name's FlexLoRA needs both; name whole "),
        (ZeroPad(), ("v/*", "q/a"), "q/a is one factor .* ZeroPad needs both; name whole layers, such as 'q/\\*'"),
        (FFA, ("q/a",), "q/a is never trained by the rule"),
    ],
    ids=repr,
)
def test_parts_that_can_not_be_personal_are_refused(rule, tensors, message):
    with pytest.raises(ConfigError, match=f"^personal.tensors: {message}"):
        personal(rule, tensors).layout(start().task)


@pytest.mark.parametrize(("rule", "tensors"), [(FFA, ("*/b",)), (FEDSA, ("q/b",)), (FEDIT, DENSE)], ids=repr)
def test_it_is_enough_that_something_is_shared(rule, tensors):
    assert personal(rule, tensors).layout(start().task).size > 0


def test_a_rule_that_trains_cores_keeps_leaves_but_no_layers_on_the_client():
    class Cores(FactorMean):
        def trains(self, task):
            return "ab" if task.round < self.first else "core"

    def cores(first):
        rule = Cores()
        object.__setattr__(rule, "first", first)
        return rule

    personal(cores(0), ("head",)).layout(start().task)
    personal(cores(4), ("q/*",)).layout(start().task)  # its first rounds are looked at
    with pytest.raises(ConfigError, match=r"^personal.tensors: rule.name's Cores trains no factors"):
        personal(cores(3), ("q/*",)).layout(start().task)


@pytest.mark.parametrize("rule", [FEDIT, LoRAA2(), FlexLoRA(), HetLoRA(), Subspace(seed=5)], ids=repr)
def test_leaves_can_be_all_that_is_shared(rule):
    hiding, state = personal(rule, ("*/a", "*/b")), start()
    clients = cohort(hiding, state, (3, 1))
    got = play(hiding, state, clients).state.adapter
    total = sum(weight for _, weight in clients.values())
    for name, x in got.dense.items():
        want = sum(w / total * u.trained.dense[name] for u, w in clients.values())
        np.testing.assert_allclose(x, want, atol=2e-6)


@pytest.mark.parametrize("tensors", [("head",), ("q/*", "haed")])
def test_clients_that_walk_along_common_directions_keep_nothing_of_them(tensors):
    walking = FedKSeed(seed=3, size=7)
    assert personal(walking, ()) is walking
    assert PersonalMean(walking, tensors).pool == walking.pool
    message = f"personal.tensors: got {', '.join(tensors)}, and clients that train by forward passes alone move all"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        personal(walking, tensors)
