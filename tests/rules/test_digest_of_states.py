"""The digest of what a server's model is."""

from hashlib import sha256

import numpy as np

from fedpeft.adapters import Adapter, LowRank
from fedpeft.rules import ServerState, Task


def test_the_digest_of_a_state_covers_the_tail():
    rng = np.random.default_rng(0)
    first = Adapter({"w": LowRank(rng.normal(size=(2, 5)), rng.normal(size=(4, 2)), 1.0)})
    tail = LowRank(np.ones((1, 5)), np.ones((4, 1)), 2.0)
    task = Task(first.spec)
    digests = [ServerState(task, first).digest, ServerState(task, first, {"w": tail}).digest]
    digests.append(ServerState(task, first, {"w": LowRank(tail.a, 2 * tail.b, 2.0)}).digest)
    digests.append(ServerState(task, first.moved({"w/a": np.ones((2, 5))}), {"w": tail}).digest)
    assert digests[0] == first.digest
    assert len(set(digests)) == 4
    assert ServerState(task, first, {"w": LowRank(tail.a.copy(), tail.b.copy(), 2.0)}).digest == digests[1]
    whole = f"{first.digest} {Adapter({'w': tail}).digest}"
    assert digests[1] == sha256(whole.encode()).hexdigest()
