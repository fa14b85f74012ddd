"""Two servers: the sum is exact, whoever is lost, and neither server gets anything else."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedpeft.errors import ProtocolError
from fedpeft.secagg.collector import Collector
from fedpeft.secagg.encoding import derive_key, digest, lp, parts
from fedpeft.secagg.helper import Helper, HelperKey, InMemory
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.masks import Mask, add_masks
from fedpeft.secagg.messages import Abort, Envelope, Kind, enclose
from fedpeft.secagg.params import Params, hash_models
from fedpeft.secagg.protocol import Phase, Refused, Step, Vectors
from fedpeft.secagg.ring import pack, unpack
from fedpeft.secagg.roster import Member, Roster
from fedpeft.secagg.sealing import SEALED, Channel, Entry, Request, Sum, about, read_answer
from fedpeft.secagg.terms import Expected, History, Policy
from fedpeft.secagg.transcript import vector_text
from fedpeft.secagg.twoserver import TwoServer

N, DIMS, M = 7, (37, 11), 24
ADMIN = Identity.of(b"\x77" * 32)
KEY = HelperKey.of(b"\x55" * 32)
PEOPLE = sorted((Identity.of(bytes([i]) * 32) for i in range(1, N + 1)), key=lambda x: x.id)
IDS = tuple(x.id for x in PEOPLE)
ROSTER = Roster(tuple(Member(x) for x in IDS), KEY.public, expires=1000).signed(ADMIN)
MODEL, SHARED = digest("model", b""), digest("shared", b"q")
MODELS = {"4": MODEL.hex()}
PARAMS = Params(
    v=1,
    suite="twoserver",
    consistency=True,
    run_id="a run",
    fl_round=3,
    attempt=0,
    session="ab" * 16,
    n=N,
    t=5,
    k=0,
    m=M,
    bits=18,
    range="4",
    clip="",
    dims=DIMS,
    layout_hash="11" * 32,
    model_hash=hash_models(MODELS).hex(),
    models=MODELS,
    base="tiny",
    weighting="1",
    cohort=tuple(x.hex() for x in IDS),
    ranks=(4,) * N,
)
EXPECTED = Expected("11" * 32, DIMS, "4", "", None, "1", 4, "tiny")
PROTOCOL = TwoServer(helper_id=KEY.identity.id.hex())


@dataclass
class Given(Vectors):
    """What surrounds one client: what came with the message, and its vectors, drawn from a seed."""

    seed: int
    told: bytes = MODEL

    def model_hash(self):
        if not self.told:
            raise RuntimeError("nothing came")
        return self.told

    def vector(self, pass_):
        return np.random.default_rng((self.seed, pass_)).integers(0, 2**M, DIMS[pass_], dtype=np.uint32)


@dataclass
class Entropy:
    """Bytes that differ from call to call and from client to client, and which are kept to be looked for."""

    seed: int
    given: list[bytes] = field(default_factory=list)

    def __call__(self, size):
        self.given.append(np.random.default_rng((self.seed, len(self.given), 99)).bytes(size))
        return self.given[-1]


def sender(i, policy=None, history=None, expected=EXPECTED, roster=ROSTER):
    return PROTOCOL.client(PEOPLE[i], roster, policy or Policy(), history or History(), expected)


def ask(server, i, state=b"", told=MODEL, entropy=None):
    return sender(i).answer(state, server.outbox()[IDS[i]], Given(i, told), entropy or Entropy(i))


def helper(**changes):
    made = {"key": KEY, "roster": ROSTER, "admins": {ADMIN.id}, "policy": Policy(), "answered": InMemory()}
    return Helper(**(made | changes))


def collected(who=range(N), params=PARAMS) -> tuple[Collector, dict[int, Step]]:
    """A server whose first pass is closed, with the answers of these clients in it."""
    server = PROTOCOL.server(params, ROSTER)
    steps = {i: ask(server, i) for i in who}
    for i, step in steps.items():
        server.receive(IDS[i], step.answer)
    server.close()
    return server, steps


def plain(who, pass_):
    return np.sum([Given(i).vector(pass_) for i in who], axis=0, dtype=np.uint64).astype(np.uint32) & (2**M - 1)


def why(reply):
    return None if reply.refusal is None else reply.refusal.code


def test_two_passes_with_dropouts_in_each_are_exact():
    second = helper()
    server, steps = collected([0, 1, 3, 4, 5, 6])
    assert server.total is None
    assert not server.is_over
    assert server.phase == Phase("vectors", 0, "model")
    assert server.waiting == frozenset()
    reply = second.answer(server.to_helper(), 5.0)
    assert why(reply) is None
    server.from_helper(reply.answer)
    np.testing.assert_array_equal(server.total, plain([0, 1, 3, 4, 5, 6], 0))
    assert server.survivors == tuple(IDS[i] for i in [0, 1, 3, 4, 5, 6])
    assert server.to_helper() is None
    assert server.phase == Phase("vectors", 1, "pass")
    assert server.waiting == set(server.survivors)
    server.begin(SHARED)
    server.drop(IDS[6])
    for i in [0, 1, 3, 4, 5]:
        last = ask(server, i, steps[i].state, SHARED)
        assert last.is_over
        assert not last.was_refused
        server.receive(IDS[i], last.answer)
    server.close()
    np.testing.assert_array_equal(server.total, plain([0, 1, 3, 4, 5, 6], 0))
    server.from_helper(second.answer(server.to_helper(), 5.0).answer)
    np.testing.assert_array_equal(server.total, plain([0, 1, 3, 4, 5], 1))
    assert server.is_over
    assert server.culprits == {}
    assert server.outbox() == {}
    with pytest.raises(RuntimeError, match="over"):
        server.phase  # noqa: B018
    with pytest.raises(RuntimeError, match="over"):
        server.close()


@pytest.mark.parametrize("m", [16, 24, 32])
def test_bytes_are_those_of_the_specification(m):
    """The formulas again, from the text: mask, seal, signature and the helper's sum."""
    server = PROTOCOL.server(params := replace(PARAMS, m=m, bits=13), ROSTER)
    seed, secret = b"\x01" * 32, b"\x02" * 32
    entropy = iter((seed, secret)).__next__
    given = Given(2)
    given.vector = lambda pass_: np.arange(DIMS[pass_], dtype=np.uint32)
    step = sender(2).answer(b"", server.outbox()[IDS[2]], given, lambda size: entropy())
    body = bytes(Envelope.open(step.answer).body)
    ctx = digest("ctx", params.to_json())
    mask = np.zeros(DIMS[0], np.uint32)
    add_masks(mask, [Mask(derive_key(seed, ctx, b"2s" + IDS[2]), 1)])
    packed = pack(np.arange(DIMS[0], dtype=np.uint32) + mask, m)
    assert body[SEALED + 64 :] == packed
    assert len(body) == 144 + DIMS[0] * m // 8
    made, box = body[:32], body[32:80]
    common = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(KEY.public))
    key = derive_key(common, ctx, b"2s-enc" + IDS[2] + made + KEY.public)
    assert ChaCha20Poly1305(key).decrypt(bytes(12), box, ctx + IDS[2]) == seed
    text = b"fedpeft-sa/1/2s" + digest("2s", ctx, b"\0", b"", IDS[2], vector_text(ctx, 0, packed), body[:80])
    Ed25519PublicKey.from_public_bytes(IDS[2]).verify(body[80:144], text)
    of_pass = Channel(ctx, IDS[2], 1, SHARED).mask(seed, -1)
    assert of_pass == Mask(derive_key(seed, ctx, b"2s" + IDS[2] + b"\1" + SHARED), -1)


def test_nothing_secret_is_kept_or_shown():
    server = PROTOCOL.server(PARAMS, ROSTER)
    entropy = Entropy(0)
    step = ask(server, 0, entropy=entropy)
    assert len(entropy.given) == 2
    for secret in entropy.given:
        assert secret not in step.state
        assert secret not in step.answer
    again = Entropy(1)
    ask(server, 0, entropy=again)
    assert again.given[0] != entropy.given[0]
    assert KEY._secret.hex() not in repr(KEY)
    assert repr(KEY._secret) not in repr(KEY)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY)
    text = repr(Sum.of(KEY.identity, bytes(32), b"\x99" * 40))
    assert "\\x99" not in text


def test_a_pass_has_a_fresh_seed_and_its_mask_names_what_was_broadcast():
    server, steps = collected()
    server.from_helper(helper().answer(server.to_helper(), 5.0).answer)
    first, second = Entropy(0), Entropy(0)
    a = ask(server, 0, steps[0].state, SHARED, first).answer
    b = ask(server, 0, steps[0].state, digest("shared", b"other"), second).answer
    assert first.given == second.given  # the same seed, and yet another mask
    assert a[-20:] != b[-20:]


@pytest.mark.parametrize(
    ("code", "change", "policy"),
    [
        ("suite", {"suite": "full"}, {}),
        ("suite", {}, {"suites": ("full",)}),
        ("version", {"v": 2}, {}),
        ("threshold", {"t": 4}, {}),
        ("cohort", {}, {"min_cohort": 8}),
        ("replay", {"session": "cd" * 16}, {}),
        ("round", {"fl_round": 1}, {}),
        ("layout", {"dims": (37, 12)}, {}),
        ("rank", {"ranks": (5,) * N, "models": {"4": MODEL.hex(), "5": MODEL.hex()}}, {}),
        ("roster", {"cohort": (*(x.hex() for x in IDS[:-1]), "ff" * 32)}, {}),
    ],
)
def test_a_client_refuses_what_its_policy_does_not_allow(code, change, policy):
    params = replace(PARAMS, **change)
    if "models" in change:
        params = replace(params, model_hash=hash_models(params.models).hex())
    message = enclose(Kind.ASK_VECTOR, bytes.fromhex(params.session), 0, params.to_json())
    mine = sender(2, Policy(**policy), History({"cd" * 16}, 2))
    entropy = Entropy(0)
    step = mine.answer(b"", message, Given(2), entropy)
    assert step.was_refused
    assert step.is_over
    said = Abort.read(Envelope.open(step.answer).body)
    assert said.is_of(IDS[2], bytes.fromhex(params.session))
    if code == "suite" and change:
        assert said.code in ("degree", "threshold", "suite")  # of full, which this client's policy has
    else:
        assert said.code == code
    assert not entropy.given


def refused(step):
    assert step.was_refused
    return Abort.read(Envelope.open(step.answer).body).code


def test_a_client_refuses_another_model_none_and_a_vector_that_does_not_fit():
    message = PROTOCOL.server(PARAMS, ROSTER).outbox()[IDS[0]]
    assert refused(sender(0).answer(b"", message, Given(0, digest("other")), Entropy(0))) == "model"
    assert refused(sender(0).answer(b"", message, Given(0, b""), Entropy(0))) == "model"
    hidden = replace(PARAMS, ranks=())
    given = sender(0, expected=replace(EXPECTED, rank=None))
    message = PROTOCOL.server(hidden, ROSTER).outbox()[IDS[0]]
    assert not given.answer(b"", message, Given(0), Entropy(0)).was_refused
    assert refused(given.answer(b"", message, Given(0, SHARED), Entropy(0))) == "model"
    for bad in (np.zeros(36, np.uint32), np.zeros(37, np.int64), np.zeros((37, 1), np.uint32)):
        given = Given(0)
        given.vector = lambda pass_, bad=bad: bad
        message = PROTOCOL.server(PARAMS, ROSTER).outbox()[IDS[0]]
        assert refused(sender(0).answer(b"", message, given, Entropy(0))) == "vector"

    def fails(pass_):
        raise ValueError("NaN")

    given.vector = fails
    assert refused(sender(0).answer(b"", message, given, Entropy(0))) == "vector"


def test_a_client_answers_once_in_order_and_then_no_more():
    server, steps = collected()
    message = PROTOCOL.server(PARAMS, ROSTER).outbox()[IDS[0]]
    repeat = sender(0).answer(steps[0].state, message, Given(0), Entropy(0))
    assert refused(repeat) == "phase"
    assert refused(sender(0).answer(repeat.state, message, Given(0), Entropy(0))) == "closed"
    assert refused(sender(0).answer(b"", b"garbage", Given(0), Entropy(0))) == "malformed"
    session = bytes.fromhex(PARAMS.session)
    later = enclose(Kind.ASK_VECTOR, session, 1, PARAMS.to_json())
    stray = sender(0).answer(b"", later, Given(0), Entropy(0))
    assert refused(stray) == "session"
    assert stray.state == b""
    other = enclose(Kind.ASK_VECTOR, session, 1, replace(PARAMS, t=6).to_json())
    assert refused(sender(0).answer(steps[0].state, other, Given(0, SHARED), Entropy(0))) == "session"
    wrong = enclose(Kind.ASK_KEYS, session, 1, PARAMS.to_json())
    assert refused(sender(0).answer(steps[0].state, wrong, Given(0, SHARED), Entropy(0))) == "phase"
    lying = enclose(Kind.ASK_VECTOR, b"\xcd" * 16, 0, PARAMS.to_json())
    assert refused(sender(0).answer(b"", lying, Given(0), Entropy(0))) == "session"
    server.from_helper(helper().answer(server.to_helper(), 5.0).answer)
    last = ask(server, 0, steps[0].state, SHARED)
    assert last.is_over
    assert refused(sender(0).answer(last.state, later, Given(0, SHARED), Entropy(0))) == "closed"
    new = replace(PARAMS, session="ef" * 16)
    fresh = PROTOCOL.server(new, ROSTER).outbox()[IDS[0]]
    assert not sender(0).answer(last.state, fresh, Given(0), Entropy(0)).was_refused


def signed(i, sealed=None, pass_=0, shared=b"", packed=None, who=None, seed=b"\x09" * 32):
    """A client's answer, made by hand, with one part of it as told."""
    channel = Channel(PARAMS.ctx, IDS[i], pass_, shared)
    packed = packed or bytes(DIMS[pass_] * M // 8)
    sealed = sealed or channel.seal(seed, KEY.public, b"\x08" * 32)
    signature = PEOPLE[i if who is None else who].sign(channel.text(vector_text(PARAMS.ctx, pass_, packed), sealed))
    return enclose(Kind.VECTOR, bytes.fromhex(PARAMS.session), pass_, sealed, signature, packed)


BAD = {
    "length": lambda i: signed(i)[:-1],
    "signature": lambda i: signed(i, who=(i + 1) % N),
    "key": lambda i: signed(i, sealed=bytes(SEALED)),
    "malformed": lambda i: b"?" * 50,
    "phase": lambda i: signed(i, pass_=1),
    "aborted": lambda i: sender(i).answer(b"", b"", Given(i), Entropy(i)).answer,
}


def test_the_server_puts_out_who_sends_what_it_can_not_take_and_the_others_go_on():
    server = PROTOCOL.server(replace(PARAMS, t=1), ROSTER)
    server.params = PARAMS
    for i, (code, make) in enumerate(BAD.items()):
        message = make(i)
        if code == "aborted":
            refusal = Abort.of(PEOPLE[i], bytes.fromhex(PARAMS.session), "vector", None).to_bytes()
            message = enclose(Kind.ABORT, bytes.fromhex(PARAMS.session), 0, refusal)
        with pytest.raises(Refused) as found:
            server.receive(IDS[i], message)
        assert (found.value.code, found.value.culprit) == (code, IDS[i])
        with pytest.raises(Refused) as found:
            server.receive(IDS[i], signed(i))
        assert found.value.code == "stranger"
    assert set(server.culprits) == {IDS[i] for i, code in enumerate(BAD) if code != "aborted"}
    assert server.waiting == {IDS[6]}
    good = ask(server, 6).answer
    server.receive(IDS[6], good)
    with pytest.raises(Refused) as found:
        server.receive(IDS[6], good)
    assert found.value.code == "repeat"
    with pytest.raises(Refused) as found:
        server.receive(b"\xee" * 32, good)
    assert found.value.code == "stranger"
    np.testing.assert_array_equal(server._sum, unpack(good[-DIMS[0] * 3 :], DIMS[0], M))
    with pytest.raises(ValueError, match="not of this cohort of 7"):
        server.drop(b"\xee" * 32)
    with pytest.raises(ProtocolError, match="got 1 of 7; want 5"):
        server.close()
    assert server.is_over
    assert server.to_helper() is None


def test_who_was_told_something_else_in_a_later_pass_is_refused():
    server, steps = collected()
    with pytest.raises(RuntimeError, match="after the first"):
        PROTOCOL.server(PARAMS, ROSTER).begin(SHARED)
    server.from_helper(helper().answer(server.to_helper(), 5.0).answer)
    server.begin(SHARED)
    with pytest.raises(Refused) as found:
        server.receive(IDS[0], ask(server, 0, steps[0].state, digest("shared", b"zeros")).answer)
    assert found.value.code == "signature"
    server.receive(IDS[1], ask(server, 1, steps[1].state, SHARED).answer)
    with pytest.raises(RuntimeError, match="no vectors yet"):
        server.begin(SHARED)


def test_a_server_that_tells_one_client_something_else_gets_no_sum_that_shows_it():
    """It may lie about the digest, and yet the helper opens masks of one digest only."""
    server, steps = collected()
    server.from_helper(helper().answer(server.to_helper(), 5.0).answer)
    zeros = digest("shared", b"zeros")
    entries = []
    for i in range(N):
        told = SHARED if i == 3 else zeros
        body = bytes(Envelope.open(ask(server, i, steps[i].state, told).answer).body)
        entries.append(Entry(IDS[i], vector_text(PARAMS.ctx, 1, body[144:]), body[:80], body[80:144]))
    for told in (SHARED, zeros):
        asked = Request(PARAMS.to_json(), 1, told, tuple(entries)).to_bytes()
        assert why(helper().answer(asked, 5.0)) == "signature"
    few = [x for i, x in enumerate(entries) if i != 3]
    assert why(helper().answer(Request(PARAMS.to_json(), 1, zeros, tuple(few)).to_bytes(), 5.0)) is None


def changed(**changes) -> Callable[[Request], Request]:
    return lambda asked: replace(asked, **changes)


def entry(at: int, **changes) -> Callable[[Request], Request]:
    def change(asked):
        rows = list(asked.entries)
        rows[at] = replace(rows[at], **changes)
        return replace(asked, entries=tuple(rows))

    return change


def params(**changes) -> Callable[[Request], Request]:
    return lambda asked: replace(asked, params=replace(PARAMS, **changes).to_json())


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("few", lambda x: replace(x, entries=x.entries[:4])),
        ("few", lambda x: replace(x, entries=())),
        ("stranger", entry(5, id=b"\xff" * 31 + b"\x7f")),
        ("request", lambda x: replace(x, entries=(x.entries[1], *x.entries))),
        ("request", lambda x: replace(x, entries=(*x.entries, x.entries[-1]))),
        ("request", lambda x: replace(x, params=x.params + b" ")),
        ("request", entry(1, sealed=bytes(79))),
        ("request", entry(1, signature=bytes(63))),
        ("request", entry(1, masked=b"")),
        ("request", changed(shared=SHARED)),
        ("request", changed(pass_=1, shared=b"x")),
        ("signature", changed(pass_=1)),
        ("signature", changed(pass_=1, shared=SHARED)),
        ("size", changed(pass_=2)),
        ("signature", entry(2, signature=bytes(64))),
        ("signature", entry(2, sealed=bytes(80))),
        ("signature", params(session="cd" * 16)),
        ("signature", params(t=1)),
        ("few", params(t=7)),
        ("suite", params(suite="full")),
        ("suite", params(v=2)),
        ("size", params(m=20)),
        ("size", params(dims=(1000, 11))),
        ("cohort", params(n=6)),
        ("cohort", params(cohort=(*PARAMS.cohort[:-1], "ff" * 32))),
        ("cohort", params(cohort=(*PARAMS.cohort[:-1], PARAMS.cohort[0]))),
        ("slice", params(ranks=(4,) * (N - 1))),
        ("slice", params(ranks=(4, 4, 4, 4, 4, 8, 8), models={"4": MODEL.hex(), "8": MODEL.hex()})),
        ("slice", params(ranks=(5,) * N)),
    ],
)
def test_the_helper_refuses_whatever_is_not_as_all_clients_agreed_and_can_be_asked_again(code, change):
    server, _ = collected([0, 1, 2, 3, 4, 6])
    asked = server.to_helper()
    second = helper(largest=999)
    bad = change(Request.read(asked)).to_bytes()
    reply = second.answer(bad, 5.0)
    assert why(reply) == code
    with pytest.raises(Refused) as found:
        read_answer(reply.answer, bad)
    assert found.value.code == "helper"
    assert code in str(found.value)
    assert why(second.answer(asked, 5.0)) is None  # nothing was used up by it


def test_the_helper_answers_a_pass_of_a_session_once():
    answered = InMemory()
    server, steps = collected()
    asked = server.to_helper()
    assert why(helper(answered=answered).answer(asked, 5.0)) is None
    assert why(helper(answered=answered).answer(asked, 5.0)) == "used"
    fewer = Request.read(asked)
    fewer = replace(fewer, entries=fewer.entries[:5]).to_bytes()
    assert why(helper(answered=answered).answer(fewer, 5.0)) == "used"
    assert answered.seen == {(b"\xab" * 16, 0)}
    server.from_helper(helper().answer(asked, 5.0).answer)
    server.begin(SHARED)
    for i in range(N):
        server.receive(IDS[i], ask(server, i, steps[i].state, SHARED).answer)
    server.close()
    assert why(helper(answered=answered).answer(server.to_helper(), 5.0)) is None


@pytest.mark.parametrize(
    ("code", "changes", "now"),
    [
        ("roster", {}, 1000.0),
        ("roster", {"admins": {IDS[0]}}, 5.0),
        ("roster", {"admins": set()}, 5.0),
        ("helper", {"key": HelperKey.of(b"\x56" * 32)}, 5.0),
        ("helper", {"roster": replace(ROSTER, helper=None, signatures={}).signed(ADMIN)}, 5.0),
        ("cohort", {"roster": Roster(ROSTER.members[1:], KEY.public).signed(ADMIN)}, 5.0),
        ("suite", {"policy": Policy(suites=("full",))}, 5.0),
        ("few", {"policy": Policy(min_cohort=7)}, 5.0),
        ("few", {"policy": Policy(max_dropout=0.1)}, 5.0),
        ("slice", {"policy": Policy(min_slice=7)}, 5.0),
        ("size", {"largest": 36}, 5.0),
        (None, {"largest": 37}, 999.0),
    ],
)
def test_the_helper_has_its_own_word_on_everything(code, changes, now):
    server, _ = collected([0, 1, 2, 3, 4, 6])
    assert why(helper(**changes).answer(server.to_helper(), now)) == code


@pytest.mark.parametrize("message", [b"", b"\0", lp(b"2s/request"), lp(b"2s/request", b"{}", b"\0", b""), b"\xff" * 99])
def test_the_helper_answers_garbage_with_a_refusal(message):
    assert why(helper().answer(message, 5.0)) == "request"


def test_a_seal_that_opens_for_nobody_names_its_client_and_the_session_is_lost():
    server = PROTOCOL.server(PARAMS, ROSTER)
    for i in range(1, N):
        server.receive(IDS[i], ask(server, i).answer)
    other = Channel(PARAMS.ctx, IDS[1], 0, b"").seal(b"\x09" * 32, KEY.public, b"\x08" * 32)  # sealed as another's
    server.receive(IDS[0], signed(0, sealed=other))
    server.close()
    second = helper()
    reply = second.answer(server.to_helper(), 5.0)
    assert (reply.refusal.code, reply.refusal.culprit) == ("seal", IDS[0])
    assert second.answered.seen == set()
    with pytest.raises(Refused) as found:
        server.from_helper(reply.answer)
    assert found.value.culprit == IDS[0]
    assert server.is_over
    assert list(server.culprits) == [IDS[0]]
    assert server.total is None


@pytest.mark.parametrize("told", ["", KEY.identity.id.hex()])
def test_the_server_takes_the_pinned_helpers_answer_to_its_very_request_only(told):
    impostor = Identity.of(b"\x66" * 32)

    def attempt(make, text):
        server, _ = collected()
        server.pinned = bytes.fromhex(told)
        asked = server.to_helper()
        with pytest.raises(ProtocolError, match=text):
            server.from_helper(make(asked))
        assert server.is_over
        assert server.total is None
        with pytest.raises(RuntimeError, match="nothing was asked"):
            server.from_helper(make(asked))

    size = DIMS[0] * 3
    attempt(lambda asked: b"", "no answer to this request")
    attempt(lambda asked: b"\0\0\0\1", "ends within")
    attempt(lambda asked: helper().answer(asked + b"x", 5.0).answer, "no answer to this request")
    attempt(lambda asked: Sum.of(KEY.identity, about(asked), bytes(size - 1)).to_bytes(), f"want {size}")
    attempt(
        lambda asked: replace(Sum.of(KEY.identity, about(asked), bytes(size)), packed=b"\1" * size).to_bytes(), "sign"
    )
    attempt(lambda asked: lp(b"2s/refused", about(asked), b"bad code!", b""), "refuses: unknown")
    forged = collected()[0]
    forged.pinned = bytes.fromhex(told)
    message = Sum.of(impostor, about(forged.to_helper()), bytes(size)).to_bytes()
    if told:
        with pytest.raises(ProtocolError, match="not signed by " + told[:8]):
            forged.from_helper(message)
    else:
        forged.from_helper(message)  # believed, as its connection was


def test_a_helper_that_never_answers_is_given_up():
    server, _ = collected()
    with pytest.raises(ProtocolError, match="helper has not answered"):
        server.close()
    assert server.is_over


def test_what_is_sent_to_the_helper_has_no_vector_in_it():
    server, steps = collected()
    asked = server.to_helper()
    for step in steps.values():
        assert step.answer[-DIMS[0] * 3 :] not in asked
    assert len(parts(asked, 99)) == 4 + 4 * N
    assert "_sum" not in repr(server)


def test_masked_vectors_of_zeros_look_uniform():
    server = PROTOCOL.server(replace(PARAMS, dims=(20_000,), m=16, bits=13), ROSTER)
    given = Given(0)
    given.vector = lambda pass_: np.zeros(20_000, np.uint32)
    mine = sender(0, expected=replace(EXPECTED, dims=(20_000,)))
    answer = mine.answer(b"", server.outbox()[IDS[0]], given, Entropy(0)).answer[-40_000:]
    counts = np.bincount(np.frombuffer(answer, np.uint8), minlength=256)
    chi = ((counts - 40_000 / 256) ** 2 / (40_000 / 256)).sum()
    assert 255 - 5 * 22.6 < chi < 255 + 5 * 22.6  # 255 degrees of freedom: deviation √510 = 22.6


def test_thresholds_and_the_label_follow_the_cohort():
    assert [TwoServer().threshold(n) for n in (5, 7, 8, 20, 100)] == [5, 5, 5, 12, 60]
    assert TwoServer(min_cohort=3, max_dropout=0.5).threshold(20) == 10
    assert TwoServer().degree(20) == 0
    label = TwoServer().label(20)
    assert (label.name, label.corrupt, label.dropouts) == ("twoserver", 0.5, 0.4)
    assert "in league" in label.trusts[0]
    assert "TLS connection" in label.trusts[1]
    assert "signature" in PROTOCOL.label(20).trusts[1]
    assert "12 or more" in label.hides
    with pytest.raises(ValueError, match="a cohort of 4; want 5"):
        TwoServer().threshold(4)
    with pytest.raises(ValueError, match="min_cohort"):
        TwoServer(min_cohort=2)
    for wrong in ("xyz", "ab", "00" * 32, "AB" * 32):
        with pytest.raises(ValueError, match="helper_id"):
            TwoServer(helper_id=wrong)


def test_a_server_is_made_for_members_and_a_roster_with_a_helper_only():
    with pytest.raises(ValueError, match="helper"):
        PROTOCOL.server(PARAMS, replace(ROSTER, helper=None))
    with pytest.raises(ValueError, match="want 'twoserver'"):
        PROTOCOL.server(replace(PARAMS, suite="full"), ROSTER)
    with pytest.raises(ValueError, match="1 of the cohort are not in the roster"):
        PROTOCOL.server(PARAMS, Roster(ROSTER.members[1:], KEY.public))
    no_helper = sender(0, roster=replace(ROSTER, helper=None))
    message = PROTOCOL.server(PARAMS, ROSTER).outbox()[IDS[0]]
    assert refused(no_helper.answer(b"", message, Given(0), Entropy(0))) == "helper"
