"""The helper on a wire: over TLS on loopback, with its notes on the disk."""

import re
import sqlite3
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from fedpeft.cli import app
from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.flower.helper import PATH, AnsweredFile, Service, helper_call, helper_service
from fedpeft.run.helper import floors, serve_helper
from fedpeft.run.keys import helper_key, make_identity, read_identity, write_roster
from fedpeft.secagg.encoding import digest
from fedpeft.secagg.helper import Helper, HelperKey
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.params import Params, hash_models
from fedpeft.secagg.protocol import Refused, Vectors
from fedpeft.secagg.roster import Member, Roster
from fedpeft.secagg.sealing import Request
from fedpeft.secagg.terms import Expected, History, Policy
from fedpeft.secagg.twoserver import TwoServer

N, DIMS, M = 6, (23, 9), 32
ADMIN = Identity.of(b"\x71" * 32)
KEY = HelperKey.of(b"\x51" * 32)
PEOPLE = sorted((Identity.of(bytes([i]) * 32) for i in range(1, N + 1)), key=lambda x: x.id)
ROSTER = Roster(tuple(Member(x.id) for x in PEOPLE), KEY.public).signed(ADMIN)
MODEL, SHARED = digest("model", b""), digest("shared", b"q")
PROTOCOL = TwoServer(helper_id=KEY.identity.id.hex())
NOW = 1_000_000.0


def params(session="ab" * 16):
    models = {"4": MODEL.hex()}
    return Params(
        v=1,
        suite="twoserver",
        consistency=True,
        run_id="a run",
        fl_round=3,
        attempt=0,
        session=session,
        n=N,
        t=5,
        k=0,
        m=M,
        bits=20,
        range="4",
        clip="",
        dims=DIMS,
        layout_hash="11" * 32,
        model_hash=hash_models(models).hex(),
        models=models,
        base="tiny",
        weighting="1",
        cohort=tuple(x.id.hex() for x in PEOPLE),
        ranks=(4,) * N,
    )


class Given(Vectors):
    """A client that adds its number, times the pass's."""

    def __init__(self, number, told=MODEL):
        self.number, self.told = number, told

    def model_hash(self):
        return self.told

    def vector(self, pass_):
        return np.full(DIMS[pass_], self.number * (pass_ + 1), np.uint32)


class Entropy:
    """Bytes that differ from call to call."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def __call__(self, size):
        return self.rng.bytes(size)


def answers(server, who, states, told=MODEL):
    """Have these clients answer, and close the pass."""
    expected = Expected("11" * 32, DIMS, "4", "", None, "1", 4, "tiny")
    for i in who:
        me = PEOPLE[i]
        side = PROTOCOL.client(me, ROSTER, Policy(), History(), expected)
        step = side.answer(states.get(i, b""), server.outbox()[me.id], Given(i + 1, told), Entropy(i))
        states[i] = step.state
        server.receive(me.id, step.answer)
    server.close()


def asked(who=range(N), session="ab" * 16):
    server = PROTOCOL.server(params(session), ROSTER)
    answers(server, who, {})
    return server


@pytest.fixture(scope="module")
def tls():
    """(certificate of an authority, certificate of 127.0.0.1 and localhost, its private key), and another's, PEM."""
    return [_authority(name) for name in ("one", "other")]


def _authority(name):
    root, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {name}")])
    day = datetime.now(UTC) - timedelta(days=1)

    def made(subject, key):
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(day)
            .not_valid_after(day + timedelta(days=30))
        )

    authority = made(issuer, root).add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))])
    leaf = made(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "helper")]), own).add_extension(
        hosts, critical=False
    )
    pem = [x.sign(root, hashes.SHA256()).public_bytes(Encoding.PEM) for x in (authority, leaf)]
    return (*pem, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@contextmanager
def running(tls, path, told=None, clock=lambda: NOW, **changes):
    made = {"key": KEY, "roster": ROSTER, "admins": {ADMIN.id}, "policy": Policy(), "answered": AnsweredFile(path)}
    _, certificate, private_key = tls[0]
    lines = [] if told is None else told
    with helper_service(
        Helper(**(made | changes)), "127.0.0.1:0", certificate, private_key, clock, lines.append
    ) as one:
        yield one


def test_a_session_with_dropouts_in_both_passes_is_exact_through_the_service(tls, tmp_path):
    told = []
    with running(tls, tmp_path / "state.sqlite", told) as service:
        call = helper_call(service.address, tls[0][0], 20)
        server, states = PROTOCOL.server(params(), ROSTER), {}
        answers(server, [0, 1, 2, 3, 4, 5], states)
        server.from_helper(call(server.to_helper()))
        np.testing.assert_array_equal(server.total, np.full(23, 21))  # 1 + … + 6
        server.begin(SHARED)
        answers(server, [0, 1, 3, 4, 5], states, SHARED)
        server.from_helper(call(server.to_helper()))
        np.testing.assert_array_equal(server.total, np.full(9, 2 * (21 - 3)))
        assert server.is_over
    assert len(told) == 2
    assert all(re.fullmatch(r"[\d,]+ bytes: answered", x) for x in told)
    assert AnsweredFile(tmp_path / "state.sqlite").count() == 2


def test_what_was_answered_before_a_restart_is_not_answered_again(tls, tmp_path):
    first, told = asked(), []
    with running(tls, tmp_path / "state.sqlite") as service:
        first.from_helper(helper_call(service.address, tls[0][0], 20)(asked().to_helper()))
    with running(tls, tmp_path / "state.sqlite", told) as service:
        call = helper_call(service.address, tls[0][0], 20)
        for who in (range(N), [0, 1, 2, 3, 4]):
            again = asked(who)
            with pytest.raises(Refused, match="the helper refuses: used"):
                again.from_helper(call(again.to_helper()))
            assert again.total is None
        other = asked(session="cd" * 16)
        other.from_helper(call(other.to_helper()))
        np.testing.assert_array_equal(other.total, np.full(23, 21))
    assert "refused: pass 0 of session " + "ab" * 16 in told[0]


def test_too_few_forged_and_unknown_clients_are_refused_and_the_service_goes_on(tls, tmp_path):
    server = asked()
    request = Request.read(server.to_helper())
    forged = replace(request.entries[2], signature=bytes(64))
    stranger = replace(request.entries[5], id=b"\xff" * 31 + b"\x7f")
    with running(tls, tmp_path / "state.sqlite") as service:
        call = helper_call(service.address, tls[0][0], 20)
        for code, entries in {
            "few": request.entries[:4],
            "signature": (*request.entries[:2], forged, *request.entries[3:]),
            "stranger": (*request.entries[:5], stranger),
        }.items():
            one = asked()
            one._request = replace(request, entries=entries).to_bytes()
            with pytest.raises(Refused, match=f"the helper refuses: {code}") as found:
                one.from_helper(call(one.to_helper()))
            assert found.value.culprit == {"signature": forged.id, "stranger": stranger.id}.get(code)
        assert b"request" in call(b"garbage")
        server.from_helper(call(server.to_helper()))
        np.testing.assert_array_equal(server.total, np.full(23, 21))


def test_an_expired_roster_is_refused_by_the_helpers_own_clock(tls, tmp_path):
    stale = Roster(ROSTER.members, KEY.public, expires=NOW).signed(ADMIN)
    server = asked()
    with running(tls, tmp_path / "state.sqlite", roster=stale) as service:
        answer = helper_call(service.address, tls[0][0], 20)(server.to_helper())
    with pytest.raises(Refused, match="the helper refuses: roster"):
        server.from_helper(answer)


def test_a_helper_that_another_authority_vouches_for_is_not_asked(tls, tmp_path):
    told = []
    with running(tls, tmp_path / "state.sqlite", told) as service:
        with pytest.raises(ProtocolError, match=f"helper at {service.address} gave no answer: unavailable"):
            helper_call(service.address, tls[1][0], 20)(asked().to_helper())
        with grpc.insecure_channel(service.address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(PATH)(b"", timeout=5)
        port = service.address.rpartition(":")[2]
        assert helper_call(f"localhost:{port}", tls[0][0], 20)(b"")  # the certificate has both names
    assert told == ["0 bytes: refused: 0 bytes that are no request for a sum of masks"]
    with pytest.raises(ProtocolError, match="gave no answer"):
        helper_call(service.address, tls[0][0], 5)(b"")  # it is gone


def test_there_is_one_method(tls, tmp_path):
    with running(tls, tmp_path / "state.sqlite") as service:
        channel = grpc.secure_channel(service.address, grpc.ssl_channel_credentials(tls[0][0]))
        with channel, pytest.raises(grpc.RpcError) as found:
            channel.unary_unary("/fedpeft.Helper/Other")(b"", timeout=5)
    assert found.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_helper_that_can_not_write_gives_no_answer(tls, tmp_path):
    path, told = tmp_path / "state.sqlite", []
    AnsweredFile(path).count()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE answered")
    connection.close()
    server = asked()
    with running(tls, path, told) as service, pytest.raises(ProtocolError, match="can't write down"):
        helper_call(service.address, tls[0][0], 20)(server.to_helper())
    assert told[0].startswith(f"no answer: {path}")


def test_notes_are_new_once_in_any_process(tmp_path):
    first, second = (AnsweredFile(tmp_path / "state.sqlite") for _ in range(2))
    assert [x.use(b"a" * 16, p) for x in (first, second) for p in (0, 1, 0)] == [True, True, False, False, False, False]
    assert first.use(b"b" * 16, 0)
    assert second.count() == 3


def test_an_address_or_a_certificate_that_can_not_be_used_is_named(tls, tmp_path):
    helper = Helper(KEY, ROSTER, {ADMIN.id}, Policy(), AnsweredFile(tmp_path / "state.sqlite"))
    _, certificate, private_key = tls[0]
    with running(tls, tmp_path / "state.sqlite") as service:
        for address, pem in (
            (service.address, certificate),
            ("127.0.0.1:0", b"no certificate"),
            ("nowhere", certificate),
        ):
            service_there = helper_service(helper, address, pem, private_key, lambda: NOW, print)
            with pytest.raises(ConfigError, match=f"can't listen at {re.escape(address)}"), service_there:
                pass


@pytest.fixture
def files(tls, tmp_path):
    """The files of an operator, as ``serve_helper`` takes them."""
    identity = make_identity(tmp_path / "helper.key")
    public = bytes.fromhex(helper_key(identity))
    write_roster(replace(ROSTER, helper=public, signatures={}).signed(ADMIN), tmp_path / "roster.json")
    (tmp_path / "certificate.pem").write_bytes(tls[0][1])
    (tmp_path / "private.pem").write_bytes(tls[0][2])
    return {
        "key": tmp_path / "helper.key",
        "roster": tmp_path / "roster.json",
        "admins": [ADMIN.id.hex()],
        "state": tmp_path / "state.sqlite",
        "certificate": tmp_path / "certificate.pem",
        "private_key": tmp_path / "private.pem",
        "address": "127.0.0.1:0",
        "policy": floors(5, 0.4, 3),
        "on_reply": print,
    }


def test_a_helper_starts_from_its_operators_files(files, tls):
    with serve_helper(**files) as (service, helper):
        assert helper.key.public == helper.roster.helper
        assert helper.policy.suites == ("twoserver",)
        assert b"request" in helper_call(service.address, tls[0][0], 20)(b"garbage")
    assert files["state"].exists()


def test_a_helper_that_could_answer_nobody_does_not_start(files, tmp_path):
    write_roster(ROSTER, tmp_path / "others.json")
    write_roster(replace(ROSTER, helper=None, signatures={}).signed(ADMIN), tmp_path / "none.json")
    (tmp_path / "bad.sqlite").write_bytes(b"this is no database, and is long enough to be seen as none" * 9)
    for change, error, text in (
        ({"roster": tmp_path / "others.json"}, DataError, f"others.json: names {KEY.public.hex()}; this key is"),
        ({"roster": tmp_path / "none.json"}, DataError, "none.json: names no helper; this key is"),
        ({"admins": []}, ConfigError, "admin: got none"),
        ({"admins": ["ff"]}, DataError, "admin: got 'ff'"),
        ({"admins": [PEOPLE[0].id.hex()]}, DataError, "roster.json: roster: signed by"),
        ({"certificate": tmp_path / "missing.pem"}, DataError, "missing.pem: can't be read"),
        ({"state": tmp_path / "bad.sqlite"}, DataError, "bad.sqlite"),
    ):
        with pytest.raises(error, match=text), serve_helper(**(files | change)):
            pass
    with pytest.raises(ConfigError, match="min_cohort: got 2"):
        floors(2, 0.4, 3)


def test_the_command_starts_a_helper_and_says_what_others_must_know_of_it(files, monkeypatch):
    seen = []
    monkeypatch.setattr(Service, "wait", lambda service: seen.append(service.address))
    names = {"admins": "admin", "private_key": "private-key"}
    options = [
        part
        for key, value in files.items()
        if key not in ("policy", "on_reply")
        for part in (f"--{names.get(key, key)}", value[0] if key == "admins" else str(value))
    ]
    result = CliRunner().invoke(app, ["helper", *options])
    assert result.exit_code == 0, result.output
    assert f"listening at {seen[0]}" in result.output
    identity = read_identity(files["key"])
    assert f"key in rosters: {helper_key(identity)}" in result.output
    assert f"id: {identity.id.hex()}" in result.output
    with pytest.raises(DataError, match="missing: no such file"):
        CliRunner().invoke(app, ["helper", *options, "--key", "missing"], catch_exceptions=False)
