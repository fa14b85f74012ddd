"""One client's answer to one pass: what is in it, and when it may not be added to others'."""

import numpy as np

from fedpeft.adapters import Array, Layout, Update
from fedpeft.channel import PlainChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds.exactness import of_client, sketched
from fedpeft.rounds.metrics import Metrics
from fedpeft.rules import Rule, ServerState, Task

STATISTICS = len(Metrics().vector())
"""How many numbers a client's metrics are; sketches come behind them."""


def measured(rule: Rule, task: Task, exactness: bool) -> Layout:
    """Layout of the sketches in an answer to this pass: none unless ``exactness`` is asked for."""
    return sketched(rule, task) if exactness else Layout(())


def answer_size(rule: Rule, task: Task, exactness: bool) -> int:
    """How many numbers a client sends in this pass."""
    return rule.layout(task).size + 1 + STATISTICS + measured(rule, task, exactness).size


def contribute(
    rule: Rule,
    channel: PlainChannel,
    update: Update,
    weight: float,
    metrics: Metrics,
    task: Task,
    exactness: bool = False,
) -> Array:
    """One client's answer for one pass: all that leaves it. exactness: whether sketches of its change are in it."""
    x = rule.layout(task).flatten(rule.encode(update, task))
    sketches = of_client(update, weight, measured(rule, task, exactness))
    return channel.up(x, weight, np.concatenate([metrics.vector(), sketches]))


def inspect(answer: Array, size: int, channel: PlainChannel, largest_weight: float, sketches: int = 0) -> None:
    """Raise ProtocolError for an answer that may not be added to a sum of encodings of this size.

    sketches: how many numbers come behind the metrics. They are finite, and that is all that can be known of them.
    """
    want = size + 1 + STATISTICS + sketches
    if answer.shape != (want,):
        raise ProtocolError(f"the update has shape {answer.shape}; want ({want},)")
    channel.check(answer, size, largest_weight)
    counts = Metrics.of(answer[size + 1 : size + 1 + STATISTICS])
    if min(counts.loss, counts.correct, counts.examples) < 0 or counts.correct > counts.units:
        raise ProtocolError(f"the update has impossible counts: {counts}")


def need_finite(state: ServerState) -> None:
    """Raise ProtocolError for a state that no model can run with, so that its round is left out."""
    if not state.is_finite:
        raise ProtocolError(
            "the round's mean makes the adapter NaN or infinite: lower channel.clip or channel.largest_norm, or keep "
            "the adapter in fp32"
        )
