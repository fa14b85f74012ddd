"""What a rule does, found out by trying it: nobody has to write it down, and it can't be wrong."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product

import numpy as np

from fedpeft.adapters import CORES, Adapter, Array, bases, walk_of
from fedpeft.channel import PlainChannel
from fedpeft.rules import Broadcast, MeanRule, Rule, ServerState, Task
from fedpeft.testing.cohorts import cohort, computed, drops_the_rest, in_each_pass, numbered, play, start

ROUNDS = 4
"""Rounds that are tried: more than any rule here takes until it does the same again and again."""
LAYERS = (("q", 60, 50, 3, 2.0), ("v", 45, 70, 2, 0.5))
"""So large that a sketch does not hold everything."""
SIZES = tuple(product((301, 407), (250, 353), (8, 12, 16, 24, 32)))
"""(d, k, R) of layers to count numbers for."""
EXACT = PlainChannel(largest_norm=1e300, exact=True)
NEAR = 1e-6
Counts = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a rule does.

    sum_only: whether the server needs nothing but a sum; passes: sums in a round; exact: how near the server's change
    is to the mean of the clients'; rest: what a client of a low rank does with the directions that it can't train;
    sent: the tensors of a layer that clients send, by round; up, down: numbers of one layer and client in a round,
    as formulas of d, k and the server's rank R.
    """

    sum_only: bool
    passes: int
    exact: str
    rest: str
    sent: str
    up: str
    down: str


def facts(rule: Rule) -> Facts:
    """The facts of a rule, from rounds with random clients. Takes a fraction of a second."""
    counted = [_counts(rule, d, k, rank) for d, k, rank in SIZES]
    names, _, _, has_tail = counted[0]
    up = [_formula([int(sum(x[1][i])) for x in counted]) for i in range(ROUNDS)]
    down = [_formula([x[2][i] for x in counted]) for i in range(ROUNDS)]
    return Facts(
        sum_only=isinstance(rule, MeanRule),
        passes=rule.passes,
        exact=_exactness(rule),
        rest=_rest(rule),
        sent=_in_turn(names),
        up=_in_turn(up),
        down=_in_turn(down) + (" + tail" if has_tail else ""),
    )


def numbers_up(rule: Rule, task: Task) -> list[int]:
    """How many numbers one client sends in each of the first rounds, dense leaves included."""
    rounds = [replace(task, round=i) for i in range(ROUNDS)]
    return [sum(rule.layout(replace(x, pass_=p)).size for p in range(rule.passes)) for x in rounds]


def numbers_down(rule: Rule, state: ServerState) -> int:
    """How many numbers a client of the full rank receives in a round, without constants and what later passes bring.

    That is the first round, but where only cores travel in the end, which are then as many as go up.
    """
    if rule.trains(replace(state.task, round=ROUNDS - 1)) in CORES:
        return numbers_up(rule, state.task)[-1]
    return _received(rule, rule.send(state, 1 << 30), state)


def _counts(rule: Rule, d: int, k: int, rank: int) -> tuple[list[str], Counts, list[int], bool]:
    """By round, for one layer of these sizes: names of what is sent, numbers up by pass, and numbers down."""
    state = start(dtype=np.float32, layers=(("w", d, k, rank, 1.0),))
    bare = Adapter(state.adapter.layers, {}, state.adapter.fixed)
    state = ServerState(Task(bare.spec), bare)
    names: list[str] = []
    up, down = Counts(), list[int]()
    for seed in range(ROUNDS):
        clients = cohort(rule, state, (rank, rank), seed)
        steps = in_each_pass(rule, state, clients, (rank, rank))
        layouts = [rule.layout(step.task) for step in steps]
        names.append("; ".join(", ".join(n.removeprefix("w/") for n, _ in x.shapes) for x in layouts))
        up.append(tuple(x.size for x in layouts))
        sent = [rule.send(step, rank) for step in steps]
        down.append(_received(rule, sent[0], state) + sum(_shared(x) for x in sent[1:]))
        state = play(rule, state, clients, EXACT, numbered((rank, rank))).state
    return names, up, down, bool(state.tail)


def _received(rule: Rule, sent: Broadcast, state: ServerState) -> int:
    """Numbers that travel down, without constants; of layers in core form their cores, of a walk its moves."""
    if (moves := walk_of(sent.adapter)) is not None:
        return int(moves.size) + _shared(sent)
    constant, cores = rule.constant(state.task.spec), bases(sent.adapter)
    whole = {f"{n}/{part}" for n in cores for part in "ab"}
    named = {n: x.size for n, x in sent.adapter.tensors().items() if n not in constant | whole}
    in_cores = sum(int(x.at.size) * int(x.at.shape[1]) for x in cores.values())
    return int(sum(named.values())) + in_cores + _shared(sent)


def _shared(sent: Broadcast) -> int:
    return sum(x.size for x in sent.task.shared.values())


def _formula(found: Sequence[int]) -> str:
    """These counts of ``SIZES`` as a formula; "varies" where there is none."""
    terms: Mapping[str, Callable[[int, int, int], int]] = {
        "Rd": lambda d, k, r: r * d,
        "Rk": lambda d, k, r: r * k,
        "R²": lambda d, k, r: r * r,
        "d": lambda d, k, r: d,
        "k": lambda d, k, r: k,
        "R": lambda d, k, r: r,
        "": lambda d, k, r: 1,
    }
    table = np.array([[term(*size) for term in terms.values()] for size in SIZES], np.float64)
    scale = table.max(axis=0)
    fit, *_ = np.linalg.lstsq(table / scale, np.array(found, np.float64), rcond=None)
    parts = {n: Fraction(float(x)).limit_denominator(64) for n, x in zip(terms, fit / scale, strict=True)}
    exactly = [sum(c * terms[n](*size) for n, c in parts.items()) for size in SIZES]
    return _written(parts) if exactly == list(found) else "varies"


def _written(parts: Mapping[str, Fraction]) -> str:
    left = {n: c for n, c in parts.items() if c}
    wide, more = left.get("Rd", 0), left.get("d", 0)
    both = []
    if (wide or more) and wide == left.get("Rk", 0) and more == left.get("k", 0):
        width = " + ".join(([_term(wide, "R")] if wide else []) + ([str(more)] if more else []))
        both = [f"({width})(d + k)" if wide and more else f"{width}(d + k)"]
        left = {n: c for n, c in left.items() if n not in ("Rd", "Rk", "d", "k")}
    return " + ".join(both + [_term(c, n) for n, c in left.items()]).replace("+ -", "− ") or "0"


def _term(count: Fraction | int, name: str) -> str:
    count = Fraction(count)
    over = f"/{count.denominator}" if count.denominator > 1 else ""
    times = {1: "", -1: "-"}.get(count.numerator, str(count.numerator)) if name else str(count.numerator)
    return f"{times}{name}{over}"


def _in_turn(each: Sequence[str]) -> str:
    """What happens in rounds, one after the other, in as few words as will do."""
    if len(set(each)) == 1:
        return each[0]
    if all(x == each[i % 2] for i, x in enumerate(each)):
        return f"{each[0]} | {each[1]} in turn"
    first = next(i for i in range(len(each)) if len(set(each[i:])) == 1)
    return " | ".join(each[:first]) + f" | then {each[first]}"


def _rest(rule: Rule) -> str:
    state = start(layers=(("q", 60, 50, 8, 2.0),))
    if rule.send(state, 2).adapter.layers["q"].rank == 8:
        return "has all"
    return "goes without" if drops_the_rest(rule, state) else "runs frozen"


def _exactness(rule: Rule) -> str:
    if rule.personal(start().task.spec):
        return "of what is sent"
    if _misses(rule, (3, 1, 2, 3, 3, 2, 3)) < NEAR:
        return "yes"
    if _misses(rule, (3, 3, 3, 3, 3, 3, 3)) < NEAR:
        return "equal ranks"
    if _misses(rule, (3, 1, 2, 3, 3, 2, 3), cut=True) < NEAR:
        return "but for the cut to R"
    if _misses(rule, (1, 1), cut=True) < NEAR:
        return "of few directions, but for the cut to R"
    return "no"


def _misses(rule: Rule, ranks: tuple[int, ...], cut: bool = False) -> float:
    """The largest relative error of ΔW over some rounds; of the best of rank R for what it should be, with ``cut``."""
    state, worst = start(layers=LAYERS), 0.0
    for seed in range(ROUNDS):
        clients = cohort(rule, state, ranks, seed)
        after = play(rule, state, clients, EXACT, numbered(ranks)).state
        before, now = computed(state), computed(after)
        total = sum(weight for _, weight in clients.values())
        for layer in state.task.spec.layers:
            change = sum(
                (w / total * (u.trained.layers[layer.name].product() - u.received.layers[layer.name].product()))
                for u, w in clients.values()
            )
            want = before[layer.name] + change
            aim = _truncated(want, layer.rank) if cut else want
            worst = max(worst, float(np.linalg.norm(now[layer.name] - aim) / np.linalg.norm(change)))
        state = after
    return worst


def _truncated(w: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(w)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])
