"""Simulated clients that vanish in the middle of a round, each at a step of its own."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Error, Message

from fedpeft.flower.inprocess import Handler, NodeConfig
from fedpeft.rounds import derive, place

GONE = 5
"""Flower's code for a node that is not there (flwr 1.41, ``ErrorCode.NODE_UNAVAILABLE``)."""


@dataclass(slots=True)
class Losses:
    """Which messages of a round no longer reach their client.

    Of the ``nodes`` so many vanish in each round, drawn from the seed, each before one of ``steps`` steps, all as
    likely; from there on nothing comes of them until the next round. clear, secure: which step each message of a round
    is, in the clear and under secure aggregation, so that both lose the same answers.
    """

    count: int
    nodes: int
    seed: int
    steps: int
    clear: tuple[int, ...]
    secure: tuple[int, ...]
    _seen: Counter[tuple[str, int, str]] = field(default_factory=Counter, init=False)

    def is_lost(self, message: Message) -> bool:
        """Whether this message, which is looked at once, finds nobody."""
        kind, _, action = message.metadata.message_type.partition(".")
        if action != "secure" and kind != "train":
            return False
        group, node = message.metadata.group_id, message.metadata.dst_node_id
        index = self._seen[group, node, action]
        self._seen[group, node, action] += 1
        steps = self.secure if action == "secure" else self.clear
        return steps[index % len(steps)] >= self.gone(int(group), node)  # a new attempt begins at the first step

    def gone(self, round: int, node: int) -> int:
        """The step before which a node vanishes in a round; ``steps`` for one that stays."""
        if place(node - 1, self.nodes, derive(self.seed, "lost", round)) >= self.count:
            return self.steps
        return int(np.random.default_rng(derive(self.seed, "lost", round, node)).integers(self.steps))


def losing(handler: Handler, is_lost: Callable[[Message], bool]) -> Handler:
    """The same handler, without an answer for lost messages but Flower's own error."""

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        there: list[Message] = []
        for message in messages:
            if is_lost(message):
                yield Message(Error(GONE, "the node is gone"), reply_to=message)
            else:
                there.append(message)
        yield from handler(there, nodes)

    return handle
