"""What the server could work out of all that it is sent, and what a client still has when a session is over."""

import copy
import pickle
from collections.abc import Iterable

import numpy as np
import pytest

from fedpeft.secagg import kept, ring, transcript
from fedpeft.secagg.encoding import lp, parts
from fedpeft.secagg.masks import Mask, add_masks
from fedpeft.secagg.messages import Envelope, Kind, enclose
from fedpeft.secagg.protocol import Ring
from fedpeft.secagg.states import Advertised, Agreed, Masked, Ready, Shared
from fedpeft.secagg.transcript import pair_key, pair_sign, private, self_key
from tests.secagg.parties import BROADCAST, Cohort, Party, cohort

D = 4096  # numbers: 16,384 bytes, 64 for each of 256 values
FAR = 400.0  # of 255 degrees of freedom: 6.4 standard deviations, less than one in 10^7 for bytes drawn at random


def chi_square(numbers: np.ndarray) -> float:
    """How far the bytes of these numbers are from all values being equally many: about 255 at random."""
    counts = np.bincount(np.ascontiguousarray(numbers).view(np.uint8).ravel(), minlength=256)
    expected = counts.sum() / 256
    return float(((counts - expected) ** 2).sum() / expected)


def constant(found: Cohort, value: int = 3) -> None:
    """Everyone adds the same number everywhere, so that whatever isn't masked stands out."""
    for party in found.parties.values():
        party.inputs.vectors = [np.full(x.size, value, np.uint32) for x in party.inputs.vectors]


def sent(party: Party, found: Cohort, pass_: int = 0) -> Ring:
    """The masked vector that this client has sent in a pass."""
    wanted = [Envelope.open(x.answer) for x in party.steps]
    (body,) = [x.body for x in wanted if (x.kind, x.pass_) == (Kind.VECTOR, pass_)]
    return ring.unpack(body[64:], found.params.dims[pass_], found.params.m)


def without_pairs(y: Ring, found: Cohort, u: bytes, secret: bytes, pass_: int, suffix: bytes) -> Ring:
    """What is left when all masks that a client shares with others come off its vector, with this private key."""
    y, fixed = y.copy(), found.server._dealing
    others = [v for v in fixed.around[u] if v in fixed.dealt]
    keys = [pair_key(private(secret), fixed.adverts[v].masks[pass_], fixed.th1, u, v, suffix) for v in others]
    add_masks(y, [Mask(key, -pair_sign(u, v)) for key, v in zip(keys, others, strict=True)])
    return y


def without_self(y: Ring, found: Cohort, u: bytes, seed: bytes, suffix: bytes) -> Ring:
    y = y.copy()
    add_masks(y, [Mask(self_key(seed, found.server._dealing.th1, u, suffix), -1)])
    return y


def test_a_client_that_is_lost_in_the_second_pass_does_not_lay_its_first_vector_open() -> None:
    """Its seed is given out after the first pass and its mask key after the second (secagg.md, 2.7).

    With one key pair and one seed for both passes, these two are all the masks of its first vector.
    """
    found = cohort(6, (D, D))
    constant(found)
    found.until("vectors")
    victim = found[2]
    own = kept.load(victim.state)
    assert isinstance(own, Shared)
    found.until("unmask")
    answers = found.ask()
    for id_, message in answers.items():
        found.give(id_, message)
    seed = found.server._unmasking._secret(victim.id)
    found.close()
    found.phase(lost=[victim.id])
    found.phase()
    for id_, message in found.ask().items():
        found.give(id_, message)
    key = found.server._unmasking._secret(victim.id)
    assert seed == own.secrets[0][0]
    assert key == own.secrets[1][1]
    assert len({x for both in own.secrets for x in both}) == 4  # nothing of a pass is that of another
    y = sent(victim, found)
    for pass_ in (0, 1):  # with whichever public keys and labels
        for suffix in (b"", transcript.of_pass(1, BROADCAST)):
            left = without_self(without_pairs(y, found, victim.id, key, pass_, suffix), found, victim.id, seed, b"")
            assert chi_square(left) < FAR
    # The same sums with the key that it never gave out: so the server would have read the vector, if keys were reused.
    reused = without_pairs(y, found, victim.id, own.secrets[0][1], 0, b"")
    np.testing.assert_array_equal(without_self(reused, found, victim.id, seed, b""), np.full(D, 3, np.uint32))
    assert chi_square(without_self(reused, found, victim.id, seed, b"")) > 100 * FAR
    found.close()
    np.testing.assert_array_equal(found.server.total, np.full(D, 15, np.uint32))


def test_a_vector_that_comes_too_late_stays_hidden_though_its_mask_key_is_known() -> None:
    found = cohort(6, (D,))
    constant(found)
    found.until("vectors")
    late, answers = found[4], found.ask()
    for id_, message in answers.items():
        if id_ != late.id:
            found.give(id_, message)
    found.close()
    found.phase()
    for id_, message in found.ask().items():
        found.give(id_, message)
    key = found.server._unmasking._secret(late.id)
    left = without_pairs(sent(late, found), found, late.id, key, 0, b"")
    assert chi_square(left) < FAR
    assert (left == 3).mean() < 0.01
    found.close()
    np.testing.assert_array_equal(found.server.total, np.full(D, 15, np.uint32))


@pytest.mark.parametrize("m", [16, 24, 32])
@pytest.mark.parametrize("suite", ["full", "kregular"])
def test_every_byte_of_a_masked_vector_is_as_likely_as_any_other(m: int, suite: str) -> None:
    found = cohort(6, (D,), m, suite, **({} if suite == "full" else {"k": 4, "t": 3}))
    constant(found)
    found.until("survivors")
    for party in found.parties.values():
        y = sent(party, found)
        for place in range(m // 8):
            assert chi_square(((y >> np.uint32(8 * place)) & np.uint32(255)).astype(np.uint8)) < FAR


def test_the_same_vector_in_two_sessions_and_of_two_clients_has_nothing_in_common() -> None:
    both = [cohort(5, (D,), session=bytes([i] * 16).hex()) for i in range(2)]
    for found in both:
        constant(found)
        found.until("survivors")
    for one, other in zip(both[0].parties.values(), both[1].parties.values(), strict=True):
        assert kept.load(one.state).now.params.session != kept.load(other.state).now.params.session
    vectors = [sent(party, found).astype(np.float64) for found in both for party in found.parties.values()]
    table = np.corrcoef(vectors) - np.eye(10)
    assert np.abs(table).max() < 5 / np.sqrt(D)  # 5 standard errors of a correlation of nothing
    for i, x in enumerate(vectors):
        for y in vectors[:i]:
            assert chi_square((x - y).astype(np.int64).astype(np.uint32)) < FAR


def secrets_of(data: bytes) -> set[bytes]:
    """All that is secret in a state, each by itself."""
    match kept.load(data):
        case Advertised(box=box, masks=masks):
            return {box, *masks}
        case Shared(box=box, secrets=pairs, own=own):
            return {box, *(x for both in (*pairs, *own) for x in both)}
        case Ready(now=now) | Masked(now=now) | Agreed(now=now):
            held = [both for owner in now.held.values() for both in owner]
            return {x for both in (*now.secrets, *held) for x in both}
    return set()


def has(data: bytes, secrets: Iterable[bytes]) -> bool:
    return any(x in data for x in secrets)


def test_after_its_last_answer_a_client_has_nothing_secret_left() -> None:
    found = cohort(5, (6, 7))
    found.finish()
    for party in found.parties.values():
        every = set().union(*(secrets_of(step.state) for step in party.steps))
        assert len(every) == 1 + 2 * 2 + 5 * 2 * 2  # a sealing key, a seed and a mask key a pass, shares of all owners
        assert not has(party.state, every)
        assert party.state == kept.dump(kept.Closed(bytes.fromhex(found.params.session), False))


def test_what_a_pass_is_masked_with_is_gone_with_its_vector_and_its_shares_with_their_answer() -> None:
    found = cohort(5, (6, 7))
    found.until("vectors")
    shared = kept.load(found[0].state)
    found.phase()
    masked = found[0].state
    assert not has(masked, [shared.box, *shared.secrets[0]])
    assert all(x in masked for x in shared.secrets[1])
    held = kept.load(masked).now.held
    found.phase()
    found.phase()
    ready = found[0].state
    assert not has(ready, [x for both in held.values() for x in both[0]])
    assert all(x in ready for both in held.values() for x in both[1])


@pytest.mark.parametrize("phase", ["shares", "vectors", "survivors", "unmask"])
def test_after_a_refusal_a_client_has_nothing_secret_left(phase: str) -> None:
    found = cohort(5)
    found.until(phase)
    party = found[0]
    before = secrets_of(party.state)
    assert has(party.state, before)
    step = party.answer(enclose(Kind.KEYS, bytes.fromhex(found.params.session), 0))
    assert step.was_refused
    assert not has(step.state, before)
    assert not has(step.answer, before)


def test_no_private_key_or_seed_is_in_any_answer_and_none_in_a_text() -> None:
    found = cohort(5, (6, 7))
    found.finish()
    for party in found.parties.values():
        answers = b"".join(x.answer for x in party.steps)
        for step in party.steps:
            state = kept.load(step.state)
            shown = repr(state) + str(state)
            for secret in secrets_of(step.state):
                assert repr(secret)[2:-1] not in shown
                if len(secret) == 32:
                    assert secret not in answers


def test_states_are_the_same_after_they_were_bytes() -> None:
    found = cohort(5, (6, 7))
    found.finish()
    seen = set()
    for step in found[0].steps:
        state = kept.load(step.state)
        seen.add(type(state).__name__)
        assert kept.dump(state) == step.state
        assert kept.load(kept.dump(state)) == state
        assert copy.deepcopy(state) == state
        assert pickle.loads(pickle.dumps(step.state)) == step.state
    assert seen == {"Advertised", "Shared", "Masked", "Agreed", "Ready", "Closed"}


def test_bytes_that_are_no_state_are_the_callers_mistake_and_the_error_tells_nothing_of_them() -> None:
    found = cohort(5)
    found.phase()
    state = found[0].state
    torn = lp(*parts(state, 9)[:-1], bytes(31))
    for bad in (torn, b"\0\0\0\1x", state[:-1], state + b"\0", lp(b"closed"), lp(b"ready"), lp(), b"\xff" * 9):
        with pytest.raises(ValueError, match=r"^these bytes are no state of a session; want what the last step kept$"):
            kept.load(bad)


def test_entropy_that_runs_dry_is_not_made_do_with() -> None:
    found = cohort(5)
    found[0].entropy = lambda size: bytes(size - 1)
    with pytest.raises(ValueError, match="entropy gave 31 bytes; want 32"):
        found.ask()
