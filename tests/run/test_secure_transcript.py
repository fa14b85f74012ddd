"""All that the coordinator receives in a real run of 20 clients, byte by byte: allowed fields, and nothing in them.

A run draws the same secrets each time here, so that what looks random is the same in each run of the test as well.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import pytest

import fedpeft.run.members
import fedpeft.run.secure
from fedpeft.flower import Secure
from fedpeft.run.simulated import simulated_identity
from fedpeft.secagg import transcript
from fedpeft.secagg.identity import SIGNATURE_SIZE, verify
from fedpeft.secagg.messages import Advert, Dealt, Envelope, Kind, Vector, cut, read_shares
from fedpeft.secagg.params import Params
from fedpeft.secagg.server import Session
from tests.run.secured import Ended, Sent, Wire, ended, rows, run_of

N = 20
RUN = "ab" * 8
COUNTS = tuple(127 + 8 * i + i % 3 for i in range(N))
SECURE = {"query.secure": (Kind.KEYS, Kind.SURVIVORS, Kind.UNMASK), "train.secure": (Kind.SHARES, Kind.VECTOR)}
CAPABILITIES = {"client", "base", "examples", "central", "holds", "start", "rank", "identity"}
FAR = 400.0
"""Chi-square of 255 degrees of freedom: bytes drawn at random are beyond it once in 5 · 10^7 times (5.5 standard
deviations after Wilson and Hilferty), so one of the 15 looks taken here is once in 3 million choices of secrets."""


@dataclass(frozen=True)
class Heard:
    """A run, and what went over the wire. shared: the digests of what was broadcast for later passes."""

    run: Ended
    wire: Wire
    shared: tuple[bytes, ...]

    @property
    def params(self) -> Params:
        first = next(x for x in self.wire.asked if x[0] == Kind.ASK_KEYS)
        return Params.from_json(bytes(Envelope.open(first).body))

    def of(self, kind: Kind) -> list[Sent]:
        """All messages of this kind, by client."""
        found = [x for x in self.wire.sent if x.parcel.kind == "secured" and x.envelope.kind == kind]
        return sorted(found, key=lambda x: (x.envelope.pass_, x.client))

    def by(self, client: int) -> bytes:
        """All bytes of a client, from all its messages."""
        return b"\0".join(x.buffer + b"\0" + x.manifest for x in self.wire.sent if x.client == client)


def drawn(seed: str) -> Callable[[int], bytes]:
    numbers = count()
    return lambda size: hashlib.shake_256(f"{seed} {next(numbers)}".encode()).digest(size)


@pytest.fixture(scope="module", params=["fedit", "subspace"])
def heard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Heard:
    path = tmp_path_factory.mktemp(request.param)
    table, wire, shared = rows(path / "own.csv", COUNTS), Wire(), list[bytes]()
    begin = Session.begin

    def begun(session: Session, digest: bytes) -> None:
        shared.append(digest)
        begin(session, digest)

    more = {"rule": {"name": request.param}, "secagg": {"name": "full"}, "weighting": {"name": "examples", "cap": 1000}}
    with pytest.MonkeyPatch.context() as patch:
        wire.tap(patch)
        patch.setattr(sys.modules["fedpeft.run.simulate"], "token_hex", lambda size: RUN)
        patch.setattr(fedpeft.run.secure, "token_bytes", drawn("session"))
        patch.setattr(fedpeft.run.members, "Secure", partial(Secure, entropy=drawn("clients")))
        patch.setattr(Session, "begin", begun)
        found = ended(run_of(table, **more), path / "run")
    (only,) = found.history.rounds
    assert only.survivors == tuple(range(N))
    return Heard(found, wire, (b"", *shared))


def test_every_message_is_of_a_kind_that_is_allowed_and_holds_the_protocols_bytes_alone(heard: Heard) -> None:
    passes = len(heard.params.dims)
    assert heard.wire.kinds == {
        "KEYS": N,
        "SHARES": N,
        "VECTOR": N * passes,
        "SURVIVORS": N * passes,
        "UNMASK": N * passes,
    }
    for sent in heard.wire.sent:
        told = json.loads(sent.manifest)
        if sent.parcel.kind == "capabilities":
            assert sent.kind == "query"
            assert set(told["facts"]) == CAPABILITIES
            assert (told["facts"]["examples"], told["facts"]["client"]) == (None, sent.client)
            assert told["facts"]["identity"] == simulated_identity(RUN, sent.client).id.hex()
            continue
        assert sent.envelope.kind in SECURE[sent.kind]
        digest = hashlib.sha256(sent.buffer).hexdigest()
        want = {"schema": 1, "kind": "secured", "facts": {}, "tensors": [["message", "uint8", [len(sent.buffer)]]]}
        assert told == want | {"digest": digest}
        assert sent.manifest == json.dumps(want | {"digest": digest}, separators=(",", ":")).encode()


def test_what_nodes_say_of_themselves_ahead_of_it_is_the_same_for_all_but_who_they_are(heard: Heard) -> None:
    start = next(job.start for job, _ in heard.wire.jobs if max(x.rank for x in job.start.layers.values()) == 4)
    known = {x.tobytes() for x in start.tensors().values()} | {b""}
    said = [x for x in heard.wire.sent if x.parcel.kind == "capabilities"]
    assert {x.client for x in said} == set(range(N))
    own = {"client", "identity", "start", "rank", "holds", "central"}
    assert len({json.dumps({k: v for k, v in x.parcel.facts.items() if k not in own}) for x in said}) == 1
    for x in said:
        assert {y.tobytes() for y in x.parcel.tensors.values()} <= known  # an adapter that nobody has trained


def test_every_byte_of_the_protocols_messages_belongs_to_a_declared_field(heard: Heard) -> None:
    """Each is read with its declared format, of which nothing is left over, and each field is what it should be: keys,
    commitments and shares that fit one another, signatures of just these, and what is sealed or masked."""
    params = heard.params
    passes, session = len(params.dims), bytes.fromhex(params.session)
    ids = {c: simulated_identity(RUN, c).id for c in range(N)}
    assert sorted(ids.values()) == list(params.ids)
    for x in heard.wire.sent:
        if x.parcel.kind == "secured":
            assert x.buffer[:18] == bytes([x.envelope.kind]) + session + bytes([x.envelope.pass_])

    adverts = {}
    for x in heard.of(Kind.KEYS):
        found = Advert.read(x.envelope.body, passes)
        assert found.to_bytes() == x.envelope.body
        assert found.id == ids[x.client]
        assert verify(found.id, found.signature, transcript.advert_text(params.ctx, found.keys))
        adverts[found.id] = found
    assert len({key for one in adverts.values() for key in one.keys}) == N * (1 + passes)
    th1 = transcript.first(params.ctx, (adverts[x].parts for x in params.ids))

    dealt = {}
    for x in heard.of(Kind.SHARES):
        found = Dealt.read(x.envelope.body, N - 1, passes)
        assert found.to_bytes() == x.envelope.body
        assert verify(ids[x.client], found.signature, transcript.shares_text(th1, found.commitments))
        dealt[ids[x.client]] = found

    for x in heard.of(Kind.VECTOR):
        pass_ = x.envelope.pass_
        vector = Vector.read(x.envelope.body, params.dims[pass_] * 4)
        assert verify(ids[x.client], vector.signature, transcript.vector_text(th1, pass_, vector.packed))

    for x in heard.of(Kind.SURVIVORS):
        (signature,) = cut(x.envelope.body, [SIGNATURE_SIZE], "survivors")
        pass_ = x.envelope.pass_
        text = transcript.survivors_text(th1, pass_, heard.shared[pass_], params.ids)
        assert verify(ids[x.client], signature, text)

    for x in heard.of(Kind.UNMASK):
        holder, pass_ = ids[x.client], x.envelope.pass_
        for owner, share in zip(params.ids, read_shares(x.envelope.body, N), strict=True):
            committed = dealt[owner].shares[pass_][params.ids.index(holder)][0]
            assert transcript.share_commitment("b", th1, owner, holder, share, pass_) == committed


def chi_square(found: np.ndarray) -> float:
    """How far the bytes are from all values being equally many: about 255 at random, with a deviation of 22.6."""
    seen = np.bincount(found.ravel(), minlength=256)
    return float(((seen - found.size / 256) ** 2).sum() / (found.size / 256))


def test_masked_vectors_look_like_noise_at_every_byte_of_a_number(heard: Heard) -> None:
    for pass_ in range(len(heard.params.dims)):
        vectors = [x.envelope.body[64:] for x in heard.of(Kind.VECTOR) if x.envelope.pass_ == pass_]
        words = np.concatenate([np.frombuffer(x, np.uint8).reshape(-1, 4) for x in vectors])
        assert len(words) == N * heard.params.dims[pass_] > 256 * 5  # enough for chi-square
        assert [chi_square(words[:, place]) < FAR for place in range(4)] == [True] * 4
        assert chi_square(words) < FAR
        assert len(set(map(bytes, vectors))) == N


def forms(value: float) -> set[bytes]:
    """How a number could be written: as floats, as text, and a whole one as an integer of 8 bytes."""
    text = {repr(value), f"{value:.6f}", f"{value:.6g}", json.dumps(value), f"{value:.4f}"}
    found = {x.encode() for x in text if len(x) > 4}
    for order in "<>":
        found |= {np.array(value, f"{order}f{size}").tobytes() for size in (4, 8)}
        if float(value).is_integer():
            found.add(np.array(value, f"{order}i8").tobytes())
    return found


def test_no_count_loss_or_weight_of_a_client_is_in_what_it_sends(heard: Heard) -> None:
    """Of timings there is no field, as the other tests show: each byte is a key's, a share's or a number's."""
    clients = heard.run.history.run.clients
    assert len({x.examples for x in clients.values()}) == N  # so that each would tell its client
    assert min(x.examples for x in clients.values()) > 64
    assert len(heard.wire.jobs) == N
    for job, done in heard.wire.jobs:
        examples, said = clients[job.client].examples, heard.by(job.client)
        metrics = done.metrics
        assert metrics.loss > 0
        values = {float(examples), examples / 1000, metrics.loss, metrics.loss * metrics.units, done.travel}
        values |= {x for x in map(float, metrics.vector()) if abs(x) > 16}
        for value in values - {0.0, 1.0}:
            assert not [x for x in forms(value) if x in said], value
        assert said.count(b"examples") == said.count(b'"examples":null')  # in what a node says of itself
        assert not [x for x in (b"loss", b"accuracy", b"second", b"time") if x in said]


def test_no_two_numbers_of_an_update_are_in_what_anybody_sends(heard: Heard) -> None:
    """Neither of what was trained nor of its difference from the start, in fp32 or fp64, as anybody's messages."""
    seen = {
        x.buffer[i : i + 8] for x in heard.wire.sent if x.parcel.kind == "secured" for i in range(len(x.buffer) - 7)
    }
    assert len(seen) > 50_000
    tried = 0
    for job, done in heard.wire.jobs:
        start = job.start.tensors()
        for name, after in done.trained.tensors().items():
            if np.array_equal(after, start[name]):
                continue
            change = after.astype(np.float64) - start[name]
            for x in (after, change.astype(np.float32), change):
                raw = x.tobytes()
                windows = {raw[i : i + 8] for i in range(0, len(raw) - 7, x.itemsize)} - {bytes(8)}
                tried += len(windows)
                assert not windows & seen
    assert tried > 5_000
