"""A client's answer in few bytes, and what a codec left out of it, which the client keeps for its next answer."""

from collections.abc import Mapping

import numpy as np

from fedpeft.adapters import Array
from fedpeft.channel import Coded, Coding
from fedpeft.errors import ProtocolError

TRIES = 8
"""Times that an answer is coded anew until it is no longer than the clip."""


def compress(
    coding: Coding, answer: Array, left: Mapping[str, Array], seed: int, clip: float | None = None
) -> tuple[Coded, dict[str, Array]]:
    """An answer in the clear as it travels, and what was left out of it by tensor, for a codec that is biased.

    left: what was left out before, which is added now: error feedback, of tensors whose shape is still the same; seed:
    of what is rounded at random; clip: the norm that the server refuses an answer above. Rounding can make a vector
    longer, and so can what is added: then it is scaled down, and what that cuts off is lost, as with any clip.
    Source: Karimireddy et al., arXiv:1901.09847, algorithm 2.
    """
    vector, size = answer.astype(np.float64), coding.layout.size
    shapes = dict(coding.layout.shapes) if coding.codec.is_biased else {}
    feed = {n: where for n, where in coding.places.items() if n in shapes}
    for name, where in feed.items():
        if name in left and left[name].shape == shapes[name]:
            vector[where] += left[name].ravel()
    for _ in range(TRIES):
        coded = coding.encode(vector.astype(np.float32), np.random.default_rng(seed))
        there = coding.decode(coded).astype(np.float64)
        length = float(np.linalg.norm(there[:size]))
        if clip is None or length <= clip:
            rest = {n: (vector - there)[where].astype(np.float32).reshape(shapes[n]) for n, where in feed.items()}
            return coded, rest
        vector[:size] *= clip / length * (1 - 1e-6)
    raise ProtocolError(f"the update has norm {length:.7g} once it is coded; want at most {clip:g} (channel.clip)")
