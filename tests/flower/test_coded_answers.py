"""A coded answer on the wire, what of it is refused, and what a client keeps of what its codec left out."""

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import Adapter, Layout, LowRank
from fedpeft.channel import CODECS, Coding, TopK
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Term, pack_term, unpack_term
from fedpeft.flower.leftover import coded
from fedpeft.flower.packing import Parcel, pack, payload_bytes
from fedpeft.rounds import compress
from fedpeft.rules import FactorMean, Task
from tests.flower.grids import gathered, one_round
from tests.flower.linear import LinearTrainer, participant

LAYOUT = Layout((("q/a", (8, 40)), ("bias", (13,))))
SIZE = LAYOUT.size + 6
CODING = Coding(CODECS["int4"], LAYOUT)


def vector(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)


def test_a_coded_term_comes_back_as_the_codec_tells_it_and_takes_its_bytes():
    small, _ = compress(CODING, vector(), {}, 3)
    content = pack_term(Term(4, 1, vector(), small))
    got = unpack_term(content, SIZE, CODING)
    assert (got.round, got.pass_, got.coded) == (4, 1, None)
    np.testing.assert_array_equal(got.vector, CODING.decode(small))
    assert payload_bytes(content) < payload_bytes(pack_term(Term(4, 1, vector()))) - 0.8 * 4 * 320
    assert payload_bytes(content) >= len(small.codes) + small.rest.nbytes


def test_a_plain_term_where_codes_are_wanted_and_codes_where_none_are_is_refused():
    small, _ = compress(CODING, vector(), {}, 3)
    with pytest.raises(
        ProtocolError, match=r"a coded term holds \['term'\]; want its 'codes', bytes, and 'rest', fp32"
    ):
        unpack_term(pack_term(Term(0, 0, vector())), SIZE, CODING)
    with pytest.raises(ProtocolError, match=r"a term holds .*; want one fp32 or fp64 vector"):
        unpack_term(pack_term(Term(0, 0, vector(), small)), SIZE)


@pytest.mark.parametrize(
    ("size", "changes", "most", "why"),
    [
        (SIZE, {"more": np.zeros(1)}, SIZE, "a coded term holds"),
        (SIZE, {"codes": np.zeros(9, np.int8)}, SIZE, "a coded term holds"),
        (SIZE, {"rest": np.zeros(19)}, SIZE, "a coded term holds"),
        (SIZE, {"rest": np.zeros((1, 19), np.float32)}, SIZE, r"the update has shape \(339,\) and \(1, 19\) beside"),
        (SIZE - 1, {}, SIZE, r"the update has shape \(338,\) and \(19,\) beside the codes; want at most \(339,\)"),
        (SIZE, {}, SIZE - 1, r"the update has shape \(339,\) and \(19,\) beside the codes; want at most \(338,\)"),
        (SIZE - 7, {"rest": np.zeros(12, np.float32)}, SIZE, "12 numbers came beside the codes; want at least 13"),
        (SIZE, {"codes": np.zeros(9, np.uint8)}, SIZE, "the codes are not compressed as they should be"),
    ],
)
def test_coded_terms_that_nobody_sends_are_refused(size, changes, most, why):
    small, _ = compress(CODING, vector(), {}, 3)
    tensors = {"codes": np.frombuffer(small.codes, np.uint8), "rest": small.rest} | changes
    content = pack(Parcel("term", {"round": 0, "pass": 0, "size": size}, tensors))
    with pytest.raises(ProtocolError, match=f"^{why}"):
        unpack_term(content, most, CODING)


def start(rank: int = 8) -> Adapter:
    return Adapter({"q": LowRank(np.zeros((rank, 40), np.float32), np.zeros((40, rank), np.float32), 1.0)})


def test_what_is_left_out_is_added_to_the_next_answer_and_forgotten_with_another_codec_or_rank():
    here = replace(participant(rule=FactorMean()), up=TopK(0.1))
    task = Task(start().spec, 5)
    answer = np.random.default_rng(1).normal(size=645).astype(np.float32)
    _, kept = coded(here, 2, task, start(), answer, {})
    assert kept.keys() == {"left/said", "left/q/a", "left/q/b"}
    again, _ = coded(here, 2, task, start(), answer, kept)
    coding = Coding(TopK(0.1), here.rule.layout(task))
    there = answer + np.concatenate([kept["left/q/a"].ravel(), kept["left/q/b"].ravel(), np.zeros(5)])
    want = np.argsort(-np.abs(there[:320]))[:32]
    assert set(np.flatnonzero(coding.decode(again)[:320])) == set(want)
    for other, begin in ((replace(here, up=TopK(0.2)), start()), (here, start(4))):
        forgotten, _ = coded(other, 2, task, begin, answer, kept)
        assert forgotten.codes == coded(other, 2, task, begin, answer, {})[0].codes
    assert coded(replace(here, up=CODECS["int4"]), 2, task, start(), answer, kept)[1] == {}
    assert coded(replace(here, up=None), 2, task, start(), answer, kept) == (None, {})


def test_what_is_rounded_at_random_differs_by_round_pass_and_client_and_is_else_the_same():
    here = replace(participant(rule=FactorMean()), up=CODECS["int4"])
    answer = np.random.default_rng(1).normal(size=645).astype(np.float32)

    def codes(client: int, round: int, pass_: int, seed: int = 3) -> bytes:
        small, _ = coded(replace(here, seed=seed), client, Task(start().spec, round, pass_), start(), answer, {})
        return small.codes

    places = [(2, 5, 0), (3, 5, 0), (2, 6, 0), (2, 5, 1)]
    assert len({codes(*x) for x in places} | {codes(2, 5, 0, 4)}) == 5
    assert codes(2, 5, 0) == codes(2, 5, 0)


def test_a_client_with_another_codec_than_the_servers_is_refused_and_the_others_count():
    trainer = LinearTrainer()
    fleet, _, _ = gathered(replace(participant(trainer), up=CODECS["int8"]), 3)
    fleet = replace(fleet, up=CODECS["int8"])
    outcome, traffic = one_round(fleet, range(3))
    assert outcome.survivors == (0, 1, 2)
    assert traffic.bytes_up == sum(up for _, up in traffic.each.values())
    plain, _, _ = gathered(participant(LinearTrainer()), 3)
    outcome_plain, _ = one_round(plain, range(3))
    for name, x in outcome_plain.state.adapter.tensors().items():  # tensors this small travel in fp32
        np.testing.assert_allclose(outcome.state.adapter.tensors()[name], x, rtol=1e-6, atol=1e-7)
    with pytest.raises(ProtocolError, match="too few answers"):
        one_round(replace(plain, up=CODECS["int8"]), range(3))
