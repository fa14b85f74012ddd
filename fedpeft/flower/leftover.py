"""What a codec leaves out of a client's answers, which the client keeps until it is sent."""

from collections.abc import Mapping

import numpy as np

from fedpeft.adapters import Adapter, Array
from fedpeft.channel import Coded, Coding
from fedpeft.flower.kept import under
from fedpeft.flower.packing import Tensor
from fedpeft.flower.participant import Participant
from fedpeft.rounds import compress, derive
from fedpeft.rules import Task

_SAID = "said"
_PREFIX = "left/"


def coded(
    participant: Participant, client: int, task: Task, start: Adapter, answer: Array, state: Mapping[str, Tensor]
) -> tuple[Coded | None, dict[str, Tensor]]:
    """A client's answer as it travels, None where the run has no codec, and what it keeps of itself from now on.

    start: what it trained from; state: what it had kept. What was left out by another codec, or at other ranks, is
    forgotten; of tensors that are not sent in this round it is kept.
    """
    if participant.up is None:
        return None, {}
    coding = Coding(participant.up, participant.rule.layout(task))
    said = np.frombuffer(f"{participant.up} {[x.rank for x in start.layers.values()]}".encode(), np.uint8)
    had = under(state, _PREFIX)
    if not np.array_equal(had.pop(_SAID, np.zeros(0)), said):
        had = {}
    seed = derive(participant.seed, "code", task.round, task.pass_, client)
    found, left = compress(coding, answer, had, seed, participant.channel.clip)
    now = {n: x for n, x in had.items() if n not in dict(coding.layout.shapes)} | left
    return found, {_PREFIX + n: x for n, x in ({_SAID: said, **now} if now else {}).items()}
