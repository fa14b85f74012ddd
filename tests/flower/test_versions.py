"""Versions: both sides have the same to the last bit, whoever was asked when, and what comes else is refused."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, LowRank
from fedpeft.channel import CODECS
from fedpeft.errors import ProtocolError
from fedpeft.flower import ClientStore, drive
from fedpeft.flower.answers import Refusal
from fedpeft.flower.packing import Parcel, digest_of, pack, payload_bytes, unpack
from fedpeft.flower.participant import refusal_of
from fedpeft.flower.requests import moving, pack_request, unpack_request
from fedpeft.flower.versions import LONGEST, Held, VersionMissing, Versions, is_moving, packed
from fedpeft.rounds import SumRound
from fedpeft.rules import Broadcast, FactorMean, Task
from tests.flower.grids import first_state, gathered
from tests.flower.linear import RANK, LinearTrainer, participant

CODEC = CODECS["int8"]


def tensors(round: int, **more) -> dict[str, np.ndarray]:
    """What is to be sent in a round: a large tensor and a small one, a little further each time."""
    rng = np.random.default_rng(1)
    x, small = rng.normal(size=(9, 60)), rng.normal(size=7)
    for _ in range(round):
        x, small = x + 0.01 * rng.normal(size=x.shape), small + 0.1
    return {"adapter/q/a": x.astype(np.float32), "adapter/bias": small.astype(np.float32), **more}


def sent(version, before: str = "") -> tuple[dict, dict]:
    """Facts and tensors, as they come out of a message."""
    said, found = packed(version, version.since(before))
    parcel = unpack(pack(Parcel("k", {"version": said}, found)), "k")
    return dict(parcel.facts["version"]), dict(parcel.tensors)


def same(x, y) -> bool:
    return x.keys() == y.keys() and all(x[n].tobytes() == y[n].tobytes() and x[n].shape == y[n].shape for n in x)


@pytest.mark.parametrize("codec", [CODECS["bf16"], CODECS["int8"], CODECS["int4"]], ids=str)
def test_a_client_that_takes_each_change_has_what_the_server_has_and_nothing_drifts(codec):
    server, client = Versions(codec, ClientStore()), Held(codec, ClientStore())
    before = ""
    for round in range(12):
        version = server.of(3, round, tensors(round))
        said, found = sent(version, before)
        assert (said["steps"] is None) is (round == 0)
        got = client.restore(said, found, round)
        assert same(got, version.tensors)
        off = np.abs(got["adapter/q/a"] - tensors(round)["adapter/q/a"]).max()
        # A step of the last change alone: none of the twelve adds up.
        assert off <= 0.06 / {"Bfloat16()": 256, "Steps(bits=8)": 254, "Steps(bits=4)": 14}[str(codec)]
        np.testing.assert_allclose(got["adapter/bias"], tensors(round)["adapter/bias"], rtol=1e-6)
        before = version.digest
    assert server.of(3, 0, tensors(11)).digest == version.digest  # nothing new to send


def test_who_has_missed_a_few_gets_the_changes_since_and_who_has_missed_more_the_whole():
    server = Versions(CODEC, ClientStore())
    versions = [server.of(2, r, tensors(r)) for r in range(6)]
    last, whole = versions[-1], sum(x.nbytes for x in versions[-1].tensors.values())
    assert LONGEST == 3
    for missed in range(6):
        steps = last.since(versions[5 - missed].digest)
        assert (None if steps is None else len(steps)) == (missed if missed <= 3 else None)
        assert steps is None or sum(x.nbytes for x in steps) < whole
        client = Held(CODEC, ClientStore())
        client.restore(*sent(versions[5 - missed]), 5 - missed)
        assert same(client.restore(*sent(last, versions[5 - missed].digest), 5), last.tensors)
    assert last.since("") is None
    assert last.since("0" * 64) is None
    wide = Versions(CODECS["bf16"], ClientStore())
    versions = [
        wide.of(2, r, {"adapter/x": np.random.default_rng(r).normal(size=4000).astype(np.float32)}) for r in range(4)
    ]
    assert [len(versions[-1].since(x.digest) or ()) for x in versions] == [0, 2, 1, 0]  # three are more than all


def test_a_client_that_has_some_of_the_changes_already_takes_the_others_and_one_of_another_asks_for_all():
    server, store = Versions(CODEC, ClientStore()), ClientStore()
    client = Held(CODEC, store)
    versions = [server.of(2, r, tensors(r)) for r in range(4)]
    client.restore(*sent(versions[0]), 0)
    client.restore(*sent(versions[2], versions[0].digest), 2)
    assert same(client.restore(*sent(versions[3], versions[0].digest), 3), versions[3].tensors)
    assert same(client.restore(*sent(versions[3], versions[0].digest), 3), versions[3].tensors)
    assert same(client.restore(*sent(versions[3], versions[3].digest), 3), versions[3].tensors)
    other = Held(CODEC, ClientStore())
    with pytest.raises(VersionMissing, match=f"the version before '{versions[3].digest}' is not held here; send it w"):
        other.restore(*sent(versions[3], versions[2].digest), 3)
    assert refusal_of(VersionMissing("x")) == Refusal("constants", "x")
    assert same(Held(CODEC, store).restore(*sent(versions[3], versions[2].digest), 3), versions[3].tensors)
    with pytest.raises(VersionMissing):  # of another rank
        client.restore(
            {**sent(versions[3], versions[2].digest)[0], "rank": 5}, sent(versions[3], versions[2].digest)[1], 3
        )


def test_tensors_of_another_shape_or_name_come_in_full_beside_the_changes_of_the_others():
    server, client = Versions(CODEC, ClientStore()), Held(CODEC, ClientStore())
    first = server.of(4, 0, tensors(0, **{"tail/z": np.ones((2, 3), np.float32)}))
    client.restore(*sent(first), 0)
    second = server.of(4, 1, tensors(1, **{"tail/z": np.ones((4, 3), np.float32), "tail/y": np.full(2, 5, np.float32)}))
    said, found = sent(second, first.digest)
    assert said["steps"][0]["names"] == ["adapter/bias", "adapter/q/a"]
    assert {n for n in found if "fresh" in n} == {"step/0/fresh/tail/z", "step/0/fresh/tail/y"}
    got = client.restore(said, found, 1)
    assert same(got, second.tensors)
    assert got["tail/z"].shape == (4, 3)
    third = server.of(4, 2, tensors(2))
    assert same(client.restore(*sent(third, second.digest), 2), third.tensors)
    assert third.tensors.keys() == tensors(2).keys()


def test_what_the_server_keeps_makes_a_run_that_is_taken_up_again_go_on_from_the_same():
    store = ClientStore()
    server = Versions(CODEC, store)
    versions = [server.of(2, r, tensors(r)) for r in range(4)]
    again = Versions(CODEC, store)
    assert again.of(2, 2, tensors(2)).digest == versions[2].digest
    assert again.of(2, 3, tensors(3)).digest == versions[3].digest
    assert again.of(3, 3, tensors(3)).digest == digest_of(tensors(3))  # another rank's own
    server.hold(5, 2, versions[3].digest)
    assert (server.holds(5, 2), server.holds(5, 3), server.holds(4, 2)) == (versions[3].digest, "", "")


def test_a_change_that_would_be_infinite_is_sent_in_full():
    server = Versions(CODEC, ClientStore())
    large = {"adapter/x": np.full(300, 3e38, np.float32)}
    server.of(1, 0, large)
    version = server.of(1, 1, {"adapter/x": np.full(300, 3.4e38, np.float32)})
    assert np.isfinite(version.tensors["adapter/x"]).all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s, t: s.pop("rank"), "the manifest has no rank"),
        (lambda s, t: s.update(steps=3), "steps is '3'; want a list"),
        (lambda s, t: s.update(steps=[3]), "a step is '3'; want an object"),
        (lambda s, t: s["steps"][0].pop("names"), "the manifest has no names"),
        (lambda s, t: s["steps"][0].update(names=["adapter/z"]), "the change is of 'adapter/z', twice or without one"),
        (lambda s, t: s["steps"][0].update(names=["adapter/q/a"] * 2), "the change is of 'adapter/q/a', twice or wi"),
        (lambda s, t: s.update(digest="0" * 64), f"the version has digest [0-9a-f]*; want '{'0' * 64}'"),
        (lambda s, t: t.pop("step/0/codes"), "a step holds no codes, or no fp32 vector beside them"),
        (lambda s, t: t.update({"step/0/rest": np.zeros((2, 7), np.float32)}), "a step holds no codes, or no fp32"),
        (lambda s, t: t.update({"step/0/rest": np.zeros(8, np.float32)}), "the change has 548 numbers; want 547"),
        (lambda s, t: t.update({"step/0/rest": np.zeros(6, np.float32)}), "6 numbers came beside the codes; want at"),
        (lambda s, t: t.update({"step/0/more": np.zeros(6)}), "the message has tensors that are not wanted"),
        (lambda s, t: t.update({"step/0/codes": np.zeros(9, np.uint8)}), "the codes are not compressed as they should"),
        (lambda s, t: t.update({"step/0/fresh/x": np.zeros(9)}), "the version has digest"),
    ],
)
def test_a_version_that_nobody_sends_is_refused_and_the_one_that_is_held_stays(change, why):
    server, client = Versions(CODEC, ClientStore()), Held(CODEC, ClientStore())
    first, second = (server.of(2, r, tensors(r)) for r in range(2))
    client.restore(*sent(first), 0)
    said, found = sent(second, first.digest)
    change(said, found)
    with pytest.raises(ProtocolError, match=f"^{why}"):
        client.restore(said, found, 1)
    assert same(client.restore(*sent(second, first.digest), 1), second.tensors)


SPEC_RANK = 8


def broadcast(shift: float, round: int) -> Broadcast:
    rng = np.random.default_rng(3)
    pair = LowRank(
        rng.normal(size=(SPEC_RANK, 50)).astype(np.float32), rng.normal(size=(40, SPEC_RANK)).astype(np.float32), 2.0
    )
    a, b = (x + np.float32(shift) * rng.normal(size=x.shape).astype(np.float32) for x in (pair.a, pair.b))
    adapter = Adapter({"q": replace(pair, a=a, b=b)}, {"half": np.full(4, 0.5, np.float16)}, {"f": np.arange(6)})
    tail = {"q": LowRank(a[:2], b[:, :2], 1.0)}
    return Broadcast(Task(adapter.spec, round), adapter, tail)


def test_a_request_carries_a_version_in_place_of_the_adapter_and_the_tail():
    server, client = Versions(CODEC, ClientStore()), Held(CODEC, ClientStore())
    constant = frozenset({"q/a"})
    first, second = broadcast(0.0, 0), broadcast(0.01, 1)
    assert moving(first, constant).keys() == {"adapter/q/b", "tail/q/a", "tail/q/b"}
    assert is_moving(
        {"adapter/x": np.zeros(2), "tail/x": np.zeros(2, np.float32), "z": np.zeros(2, np.float32)}
    ).keys() == {"tail/x"}
    versions = [server.of(SPEC_RANK, i, moving(x)) for i, x in enumerate((first, second))]
    whole = pack_request("train", first, "{}", "base", version=versions[0])
    short = pack_request(
        "train", second, "{}", "base", version=versions[1], steps=versions[1].since(versions[0].digest)
    )
    plain = pack_request("train", second, "{}", "base")
    assert payload_bytes(short) < 0.6 * payload_bytes(plain)
    unpack_request(whole, lambda digest: None, client.restore)
    got = unpack_request(short, lambda digest: None, client.restore).broadcast
    assert moving(got).keys() == moving(second).keys()
    assert same(moving(got), versions[1].tensors)
    np.testing.assert_array_equal(got.adapter.dense["half"], np.full(4, 0.5, np.float16))
    np.testing.assert_array_equal(got.adapter.fixed["f"], np.arange(6))
    with pytest.raises(ProtocolError, match="the manifest has facts that are not known: \\['version'\\]"):
        unpack_request(short, lambda digest: None)  # a run without versions
    np.testing.assert_array_equal(
        unpack_request(plain, lambda digest: None, client.restore).broadcast.adapter.layers["q"].b,
        second.adapter.layers["q"].b,
    )


def rounds(fleet, count: int) -> list:
    """So many rounds of three clients; the server's state and the bytes down of each."""
    state, told = first_state(), []
    for _ in range(count):
        round = SumRound(state, dict.fromkeys(range(3), RANK), 3, rule=FactorMean())
        traffic = drive(fleet, round, 30.0)
        state = round.result().state
        told.append((state, traffic))
    return told


def test_clients_that_are_sent_versions_train_as_if_they_were_sent_all():
    """The adapter here is small, so that its change travels in fp32: what differs is its rounding."""
    fleet, _, _ = gathered(participant(), 3)
    want = rounds(fleet, 4)[-1][0].adapter
    trainer = LinearTrainer()
    coded, _, _ = gathered(replace(participant(trainer), down=CODEC), 3)
    coded = replace(coded, versions=Versions(CODEC, ClientStore()))
    got = rounds(coded, 4)[-1][0].adapter
    for name, x in want.tensors().items():
        np.testing.assert_allclose(got.tensors()[name], x, rtol=1e-4, atol=1e-6)
    assert len(trainer.seen) == 12  # each trained once a round: nobody asked for more
    assert {coded.versions.holds(c, RANK) for c in range(3)} == {coded.versions._newest[RANK].digest}


def test_a_client_that_has_lost_its_version_is_sent_the_whole_one():
    here = replace(participant(), down=CODEC)
    fleet, grid, _ = gathered(here, 3)
    fleet = replace(fleet, versions=Versions(CODEC, ClientStore()))
    (state, _), *_ = rounds(fleet, 1)
    lost = replace(here, store=ClientStore())
    grid._handler = gathered(lost, 3)[1]._handler
    round = SumRound(state, dict.fromkeys(range(3), RANK), 3, rule=FactorMean())
    drive(fleet, round, 30.0)
    assert round.result().survivors == (0, 1, 2)
    assert round.refused == []
