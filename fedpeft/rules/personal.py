"""Any rule with parts that stay on the client: a head, whole layers, or one factor of each, chosen by name.

Sources: Arivazhagan et al., arXiv:1912.00818 (FedPer: the layers nearest to the output are personal); Guo et al.,
arXiv:2410.01463 (FedSA-LoRA, which is "*/b" and the head over ``fedit``).
What stays is trained as the rule trains the rest, kept by the client between rounds and never sent, so what the rule
says of exactness and ranks holds for what is left. Sent: what the rule sends of a model without these tensors, both
ways; down they travel once, as all clients start from the same ones.
A layer that stays is hidden from the rule, so that works with any that trains factors. One factor of a layer can stay
where each is averaged by itself (fedit, ffa, rolora, rbla); other rules need both.
Known defect: what stays of a client that is never asked to train is what it began with, beside what the others learnt.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Adapter, Layout, Pool, Spec, Tensors, Update
from fedpeft.errors import ConfigError
from fedpeft.rules.base import Broadcast, ListRule, MeanRule, Rule, ServerState, Task
from fedpeft.rules.factors import FactorMean
from fedpeft.rules.frozen import frozen
from fedpeft.rules.objective import Objective


def personal(rule: MeanRule | ListRule, tensors: tuple[str, ...]) -> MeanRule | ListRule:
    """The rule, with the tensors of these names kept on the client; the rule itself where there are none.

    A name may hold ``*``, ``?`` and ``[abc]``, and is compared with a tensor's whole name ("layer/a", "layer/b", dense
    leaves as they are) and with what follows any dot in it. Raises ConfigError for a rule whose clients walk along a
    pool's directions, each of which moves all tensors.
    """
    if not tensors:
        return rule
    if rule.pool is not None:
        raise ConfigError(
            f"personal.tensors: got {', '.join(tensors)}, and clients that train by forward passes alone move all "
            f"tensors along common directions; leave it out, or use fedit"
        )
    return PersonalMean(rule, tensors) if isinstance(rule, MeanRule) else PersonalList(rule, tensors)


@lru_cache
def chosen(tensors: tuple[str, ...], spec: Spec) -> frozenset[str]:
    """The tensors of an adapter that these globs name. Raises ConfigError for a glob that names none."""
    names = [n for n, _ in (spec.factors("ab") + spec.leaves).shapes]
    found: frozenset[str] = frozenset()
    for glob in tensors:
        some = {n for n in names if fnmatchcase(n, glob) or fnmatchcase(n, f"*.{glob}")}
        if not some:
            near = get_close_matches(glob, names, cutoff=0.0)
            raise ConfigError(f"personal.tensors: {glob!r} names no tensor; the nearest are {', '.join(near)}")
        found |= some
    return found


class Hiding(Rule):
    """What both kinds of rules with personal parts share: the rule inside sees a smaller adapter."""

    rule: Rule
    tensors: tuple[str, ...]

    @property
    @override
    def passes(self) -> int:
        return self.rule.passes

    @property
    @override
    def tells_factors(self) -> bool:
        return self.rule.tells_factors

    @property
    @override
    def needs_sgd(self) -> bool:
        return self.rule.needs_sgd

    @property
    @override
    def hides_ranks(self) -> bool:
        return self.rule.hides_ranks

    @property
    @override
    def pool(self) -> Pool | None:
        return self.rule.pool

    @property
    @override
    def fewest_rounds(self) -> int:
        return self.rule.fewest_rounds

    @override
    def trains(self, task: Task) -> str:
        return self.rule.trains(self.inside(task))

    @override
    def objective(self, task: Task, start: Adapter, own: Tensors) -> Objective:
        return self.rule.objective(self.inside(task), _shown(start, chosen(self.tensors, task.spec)), own)

    @override
    def begin(self, received: Adapter, own: Tensors) -> Adapter:
        return _over(received, self.rule.begin(_shown(received, chosen(self.tensors, received.spec)), own))

    @override
    def keep(self, update: Update, task: Task, own: Tensors) -> Tensors:
        return self.rule.keep(self.seen(update, task), self.inside(task), own)

    @override
    def personal(self, spec: Spec) -> frozenset[str]:
        hidden = chosen(self.tensors, spec)
        return hidden | self.rule.personal(_shown_spec(spec, hidden))

    @override
    def constant(self, spec: Spec) -> frozenset[str]:
        hidden = chosen(self.tensors, spec)
        return hidden | self.rule.constant(_shown_spec(spec, hidden))

    @override
    def is_for(self, sent: Broadcast, rank: int) -> bool:
        hidden = chosen(self.tensors, sent.task.spec)
        return self.rule.is_for(replace(sent, task=self.inside(sent.task), adapter=_shown(sent.adapter, hidden)), rank)

    @override
    def is_nested(self, ranks: Collection[int], spec: Spec) -> bool:
        return self.rule.is_nested(ranks, _shown_spec(spec, chosen(self.tensors, spec)))

    @override
    def layout(self, task: Task) -> Layout:
        """Raises ConfigError for tensors that can't be personal with this rule."""
        self.check(task.spec)
        hidden = chosen(self.tensors, task.spec)
        return Layout(tuple((n, s) for n, s in self.rule.layout(self.inside(task)).shapes if n not in hidden))

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        hidden = chosen(self.tensors, task.spec)
        encoded = self.rule.encode(self.seen(update, task), self.inside(task))
        return {n: x for n, x in encoded.items() if n not in hidden}

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        hidden = chosen(self.tensors, state.task.spec)
        left = self.rule.send(self.within(state), rank)
        # What a client can't train of its own layers it runs frozen: a method's start need not be zero there.
        own = replace(state.adapter, layers={n: x for n, x in state.adapter.layers.items() if _is_whole(n, hidden)})
        tail = frozen(replace(state, adapter=own, tail=left.tail), rank).tail
        adapter = _over(state.adapter.cut(rank), left.adapter)
        return replace(left, task=replace(left.task, spec=state.task.spec), adapter=adapter, tail=tail)

    def inside(self, task: Task) -> Task:
        """The task as the rule inside sees it."""
        return replace(task, spec=_shown_spec(task.spec, chosen(self.tensors, task.spec)))

    def seen(self, update: Update, task: Task) -> Update:
        """The update as the rule inside sees it."""
        hidden = chosen(self.tensors, task.spec)
        return replace(update, received=_shown(update.received, hidden), trained=_shown(update.trained, hidden))

    def within(self, state: ServerState) -> ServerState:
        """The state as the rule inside sees it."""
        hidden = chosen(self.tensors, state.task.spec)
        return replace(state, task=self.inside(state.task), adapter=_shown(state.adapter, hidden))

    def without(self, after: ServerState, state: ServerState) -> ServerState:
        """The state after a round, from what the rule inside made of its part: what it does not see stays."""
        task = replace(after.task, spec=state.task.spec)
        return replace(after, task=task, adapter=_over(state.adapter, after.adapter))

    def check(self, spec: Spec) -> None:
        """Raise ConfigError for tensors that can't be personal with this rule."""
        hidden = chosen(self.tensors, spec)
        rest = _shown_spec(spec, hidden)
        names = {n for n, _ in (rest.factors("ab") + rest.leaves).shapes}
        single = sorted(names & hidden)
        if single and not isinstance(self.rule, FactorMean):
            raise ConfigError(
                f"personal.tensors: {single[0]} is one factor of a layer, and rule.name's {type(self.rule).__name__} "
                f"needs both; name whole layers, such as '{single[0][:-2]}/*', or use fedit"
            )
        trained = {part for round in range(4) for part in self.rule.trains(Task(rest, round))}
        if rest.layers != spec.layers and not trained <= {"a", "b"}:
            raise ConfigError(
                f"personal.tensors: rule.name's {type(self.rule).__name__} trains no factors, which is all there is to "
                f"train of a layer that stays; name no whole layers, or use fedit"
            )
        never = sorted(set(single) & self.rule.constant(rest) - self.rule.personal(rest))
        if never:
            raise ConfigError(
                f"personal.tensors: {never[0]} is never trained by the rule, so that it would be no client's own; "
                f"leave it out, or use fedit"
            )
        if names <= hidden | self.rule.constant(rest):
            raise ConfigError(
                f"personal.tensors: got {', '.join(self.tensors)}, which leaves nothing for the clients to share; "
                f"name fewer"
            )


@dataclass(frozen=True, slots=True)
class PersonalMean(Hiding, MeanRule):
    """A mean rule on all but these tensors, named by globs (see ``personal``)."""

    rule: MeanRule
    tensors: tuple[str, ...]

    @property
    @override
    def is_change(self) -> bool:
        return self.rule.is_change

    @override
    def between(self, mean: Tensors, state: ServerState) -> Tensors:
        return self.rule.between(mean, self.within(state))

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        hidden = chosen(self.tensors, state.task.spec)
        shapes = self.rule.layout(self.inside(state.task)).shapes
        still = {n: np.zeros(shape) for n, shape in shapes if n in hidden}
        return self.without(self.rule.decode({**mean, **still}, self.within(state)), state)


@dataclass(frozen=True, slots=True)
class PersonalList(Hiding, ListRule):
    """A rule on each client's encoding, on all but these tensors, named by globs (see ``personal``)."""

    rule: ListRule
    tensors: tuple[str, ...]

    @override
    def decode(self, encodings: Sequence[tuple[Tensors, float]], state: ServerState) -> ServerState:
        return self.without(self.rule.decode(encodings, self.within(state)), state)


def _is_whole(layer: str, hidden: frozenset[str]) -> bool:
    return f"{layer}/a" in hidden and f"{layer}/b" in hidden


def _shown_spec(spec: Spec, hidden: frozenset[str]) -> Spec:
    layers = tuple(x for x in spec.layers if not _is_whole(x.name, hidden))
    return Spec(layers, tuple((n, shape) for n, shape in spec.dense if n not in hidden))


def _shown(x: Adapter, hidden: frozenset[str]) -> Adapter:
    layers = {n: y for n, y in x.layers.items() if not _is_whole(n, hidden)}
    return replace(x, layers=layers, dense={n: y for n, y in x.dense.items() if n not in hidden})


def _over(whole: Adapter, part: Adapter) -> Adapter:
    """``whole`` with what ``part`` has in place of its own, in the order of ``whole``; what is fixed is the part's."""
    layers = {n: part.layers.get(n, x) for n, x in whole.layers.items()}
    return replace(part, layers=layers, dense={n: part.dense.get(n, x) for n, x in whole.dense.items()})
