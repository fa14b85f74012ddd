"""An answer as it travels: what is left out comes later, and no clip is passed."""

import numpy as np
import pytest

from fedpeft.adapters import Layout
from fedpeft.channel import CODECS, Coding, PlainChannel, TopK
from fedpeft.errors import ProtocolError
from fedpeft.rounds import compress

LAYOUT = Layout((("q/a", (8, 40)), ("bias", (13,)), ("q/b", (96, 8))))
BEHIND = 6
BIASED = {"sign": CODECS["sign"], "topk": TopK(0.1)}
EVERY = {**CODECS, **BIASED}


def answer(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=LAYOUT.size + BEHIND).astype(np.float32)


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
def test_an_answer_is_what_the_codec_makes_of_it(codec):
    coding = Coding(codec, LAYOUT)
    coded, left = compress(coding, answer(), {}, 5)
    again = coding.encode(answer(), np.random.default_rng(5))
    assert (coded.codes, coded.rest.tobytes()) == (again.codes, again.rest.tobytes())
    if not codec.is_biased:
        assert left == {}
        return
    there = coding.decode(coded)
    for name, (at, shape) in LAYOUT.places.items():
        size = int(np.prod(shape))
        if name == "bias":
            assert name not in left
            continue
        want = answer()[at : at + size].reshape(shape).astype(np.float64) - there[at : at + size].reshape(shape)
        np.testing.assert_allclose(left[name], want, rtol=1e-6)
        assert left[name].dtype == np.float32


@pytest.mark.parametrize("codec", BIASED.values(), ids=BIASED)
def test_over_rounds_all_is_sent_but_what_is_still_kept(codec):
    coding, left, sent, meant = (
        Coding(codec, LAYOUT),
        {},
        np.zeros(LAYOUT.size + BEHIND),
        np.zeros(LAYOUT.size + BEHIND),
    )
    for seed in range(9):
        x = answer(seed)
        coded, left = compress(coding, x, left, seed)
        sent += coding.decode(coded)
        meant += x
    for name, (at, shape) in LAYOUT.places.items():
        rest = left.get(name, np.zeros(shape))
        where = slice(at, at + int(np.prod(shape)))
        # A sum of nine fp32 numbers, each rounded, and as many remainders.
        np.testing.assert_allclose(sent[where].reshape(shape) + rest, meant[where].reshape(shape), atol=2e-5)
    np.testing.assert_allclose(sent[LAYOUT.size :], meant[LAYOUT.size :], atol=1e-5)


def test_what_was_left_out_of_another_shape_or_by_a_codec_without_feedback_is_not_added():
    large = np.full((8, 40), 100.0)
    for codec, left in ((TopK(0.1), {"q/a": large[:4]}), (TopK(0.1), {"z": large}), (CODECS["int4"], {"q/a": large})):
        coding = Coding(codec, LAYOUT)
        plain, _ = compress(coding, answer(), {}, 5)
        assert compress(coding, answer(), left, 5)[0].codes == plain.codes
    coding = Coding(TopK(0.1), LAYOUT)
    with_it, _ = compress(coding, answer(), {"q/a": large}, 5)
    assert coding.decode(with_it)[:320].sum() > 100 * 32 * 0.9


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("clip", [0.5, 20.0])
def test_an_answer_that_coding_makes_longer_than_the_clip_is_scaled_down(codec, clip):
    channel, coding = PlainChannel(clip=clip), Coding(codec, LAYOUT)
    x = channel.up(answer()[: LAYOUT.size].astype(np.float64), 2.0, np.zeros(5))
    coded, left = compress(coding, x, {}, 5, clip)
    there = coding.decode(coded)
    channel.check(there, LAYOUT.size, 2.0)
    length = np.linalg.norm(there[: LAYOUT.size].astype(np.float64))
    assert length <= clip
    if codec in (CODECS["ternary"], CODECS["int4"]):  # which are longer than what was trained
        assert length > 0.99 * clip
    np.testing.assert_array_equal(there[LAYOUT.size :], x[LAYOUT.size :])
    for name, rest in left.items():
        at, shape = LAYOUT.places[name]
        where = slice(at, at + int(np.prod(shape)))
        np.testing.assert_allclose(rest.ravel() + there[where], x[where], atol=1e-6)


def test_what_can_not_be_brought_below_the_clip_is_not_sent():
    class Stubborn(type(CODECS["bf16"])):
        def decode(self, coded, size):
            return np.ones(size, np.float32)

    with pytest.raises(
        ProtocolError, match=r"the update has norm 32\.9\d+ once it is coded; want at most 0\.1 \(channel"
    ):
        compress(Coding(Stubborn(), LAYOUT), answer(), {}, 5, 0.1)
