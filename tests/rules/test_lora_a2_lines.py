"""LoRA-A²: how many directions a client chooses, and what they are measured by."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank, Update
from fedpeft.rules import LoRAA2, ServerState, Task

each_part = pytest.mark.parametrize("part", ["a", "b"])


@each_part
def test_a_layer_of_a_rank_below_the_clients_counts_with_its_own(part):
    rng = np.random.default_rng(0)
    first = Adapter({f"w{r}": LowRank(rng.normal(size=(r, 6)), rng.normal(size=(7, r)), 0.5) for r in (1, 2, 4)})
    state = ServerState(Task(first.spec, "ba".index(part)), first)
    trained = first.moved({n: rng.normal(size=x.shape) for n, x in first.tensors(part).items()})
    sent = LoRAA2().encode(Update(first, trained), LoRAA2().send(state, 2).task)
    count = [np.count_nonzero(x.any(axis=0 if part == "b" else 1)) for x in sent.values()]
    assert sum(count) == 1 + 2 + 2


@each_part
def test_how_far_a_direction_moves_the_model_is_told_by_the_other_factor_as_it_was_received(part):
    """And not by what the client may have made of it, which it does not send."""
    was, now = (LowRank(np.diag(x) @ np.eye(2, 5), np.eye(7, 2) @ np.diag(x), 2.0) for x in ([3.0, 1.0], [1.0, 3.0]))
    first, trained = Adapter({"w": was}), Adapter({"w": replace(now, **{part: getattr(was, part) + 1.5})})
    state = ServerState(Task(first.spec, "ba".index(part)), first)
    [sent] = LoRAA2().encode(Update(first, trained), LoRAA2().send(state, 1).task).values()
    first_direction, second = sent if part == "a" else sent.T
    assert (first_direction == 1.5).all()
    assert not second.any()
