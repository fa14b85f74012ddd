"""What a round makes of what can't be: numbers that are too large for the adapter, and many clients of one rank."""

import numpy as np
import pytest

from fedpeft.channel import PlainChannel
from fedpeft.errors import ProtocolError
from fedpeft.rounds import Buffer, Buffered, ListRound, Metrics, SumRound
from fedpeft.rules import FedEx, Median, Subspace
from tests.laws.cohorts import FEDIT, cohort, metrics, play, start

WIDE = PlainChannel(largest_norm=1e12)


@pytest.mark.parametrize("rule", [FEDIT, Median(), FedEx()])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_mean_that_the_adapters_dtype_can_not_hold_leaves_the_round_out(rule, dtype):
    state = start(dtype=dtype)
    machine = (SumRound if rule is FEDIT else ListRound)(state, {1: 3, 2: 3}, 1, WIDE, rule=rule)
    size = rule.layout(state.task).size
    for client in (1, 2):
        vector = np.full(size + 5, 7e4 * client, np.float32)  # half precision ends at 65504
        vector[size:] = (1.0, *metrics(client).vector())
        machine.receive(client, vector, 0, 0)
    machine.close()
    if dtype == np.float32:
        assert machine.result().state.is_finite
        return
    with np.errstate(over="ignore"), pytest.raises(ProtocolError, match="NaN or infinite: lower"):
        machine.result()


def test_a_tail_that_is_not_finite_counts_too():
    state = start(dtype=np.float16)
    clients = cohort(FedEx(), state)
    after = play(FedEx(), state, clients).state
    assert after.is_finite
    broken = {n: type(x)(x.a, np.full_like(x.b, np.inf), x.scale) for n, x in after.tail.items()}
    assert not type(after)(after.task, after.adapter, broken).is_finite
    assert not start().next(start().adapter.put({"gate": np.array(np.nan)})).is_finite


def test_a_step_of_a_buffer_that_is_not_finite_is_left_out():
    state = start(dtype=np.float16)
    buffer = Buffer(state, FEDIT, Buffered(buffer=1, concurrency=1), channel=WIDE)
    size = FEDIT.layout(state.task).size
    [client] = buffer.choose(range(3), 1)
    buffer.ask(client)
    vector = np.full(size + 5, 8e4, np.float32)
    vector[size:] = (1.0, *Metrics(1, 1, 1, 1).vector())
    buffer.receive(client, vector, 0, 0)
    with np.errstate(over="ignore"), pytest.raises(ProtocolError, match="NaN or infinite"):
        buffer.step()
    assert buffer.state.is_finite
    assert buffer.state.task.round == 1
    assert buffer.state.adapter is state.adapter


def test_clients_of_one_rank_share_what_they_receive():
    rule = Subspace(seed=5)
    outbox = SumRound(start(), {c: 1 + c % 2 for c in range(6)}, 1, rule=rule).outbox()
    assert list(outbox) == list(range(6))
    assert all(outbox[c] is outbox[c % 2] for c in range(6))
    assert outbox[0] is not outbox[1]
    assert [outbox[c].adapter.layers["q"].rank for c in (0, 1)] == [1, 2]
