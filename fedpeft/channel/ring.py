"""The channel into the ring Z_2^m: a client's numbers on an integer grid, so that sums are exact and masks hide them.

A number is clipped, weighted and rounded at random to one of ±S steps, S = 2^(bits − 1) − 1, and right in expectation.
A client's weight, its counts and how much of its vector was cut travel in the same vector, as whole numbers in limbs
that no sum can make wrap. So nothing of a client stands beside what a protocol masks.
Rounding at random: Konečný et al., arXiv:1610.05492 (their probabilistic quantisation, here before a sum).

Tensors whose changes are small may have a finer grid than others: for each the range is halved so many times. That is
public, the same for all clients, and exact in floating point; ``scales.py`` chooses it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from math import isfinite, ldexp, sqrt
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters import Array
from fedpeft.errors import ProtocolError

Ring: TypeAlias = NDArray[np.uint32]

MODULI = (16, 24, 32)
"""Bits of the rings that there are."""
WEIGHT_BITS = 16
LARGEST = (1 << WEIGHT_BITS) - 1
"""What the largest weight is as a whole number."""
COUNT_BITS = 40
MOST = (1 << COUNT_BITS) - 1
"""The largest count of one client that travels."""
SCALES = (1024, 1, 1, 1)
"""Steps of one unit of each count: loss, units, correct, examples."""
CHUNK = 1 << 16
"""Numbers that are rounded at a time, so that a client needs no second vector in fp64."""
MOST_HALVINGS = 30
"""How often the range may be halved for a tensor."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The channel for one pass of one cohort: what its clients and their server have to agree on.

    cohort: the most vectors in a sum; size: numbers of an encoding; sketches: of sketches behind it; leaves: of each
    tensor of the encoding; halvings: how often the range is halved for it, from 0 to 30 (none of either: the range is
    that of all, as it is of sketches); the others as in ``RingChannel``. Made only where no sum of so many vectors can
    wrap: cohort · S ≤ 2^(modulus − 1) − 1.
    """

    modulus: int
    bits: int
    range: float
    clip: float | None
    cohort: int
    size: int
    sketches: int
    largest_weight: float
    leaves: tuple[int, ...] = ()
    halvings: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, number, least in (("cohort", self.cohort, 1), ("size", self.size, 1), ("sketches", self.sketches, 0)):
            if number < least:
                raise ValueError(f"{name}: got {number}; want at least {least}")
        if not 0 < self.largest_weight < float("inf"):
            raise ValueError(
                f"largest_weight: got {self.largest_weight}; want more than 0 and finite, for it is the end of a grid"
            )
        if self.leaves and sum(self.leaves) != self.size:
            raise ValueError(f"leaves: got {sum(self.leaves)} numbers in all; want the size, {self.size}")
        if len(self.halvings) != len(self.leaves) or not all(0 <= k <= MOST_HALVINGS for k in self.halvings):
            raise ValueError(
                f"halvings: got {len(self.halvings)} for {len(self.leaves)} leaves; want one for each, from 0 to "
                f"{MOST_HALVINGS}"
            )
        room = widest(self.modulus, self.cohort)
        if not 2 <= self.bits <= room:
            raise ValueError(
                f"bits: got {self.bits}; want at least 2 and at most {room}, for the sum of {self.cohort} clients has "
                f"to stay within Z_2^{self.modulus}: leave channel.bits out, take a larger channel.modulus or ask "
                f"fewer clients"
            )

    @property
    def steps(self) -> int:
        """S: steps from zero to the range."""
        return (1 << self.bits - 1) - 1

    @property
    def length(self) -> int:
        """Ring elements of one vector: encoding, sketches, weight, and the four counts and ``saturated``."""
        return self._begin + self._limbs(WEIGHT_BITS) + (len(SCALES) + 1) * self._limbs(COUNT_BITS)

    @property
    def rounding(self) -> float:
        """One step of the whole range: what no number of a mean is off by, where all clients have the largest weight.

        A client's number v, in steps, becomes ⌊v + U⌋ with U uniform in [0, 1), which is less than 1 from v. So a sum
        of n is off by less than n steps, and the mean by that over the sum of the weights' shares of the largest, which
        is n where all have it. ``error`` is for any weights.
        """
        return self.range / self.steps

    def error(self, clients: int, weight: float) -> float:
        """What no number of the mean of so many clients is off by, whose weights come to ``weight``; nor of sketches.

        Of the mean with the weights as they travel: a weight is itself rounded, to 1/65535 of the largest. Of tensors
        with finer steps it is too much: ``errors`` has theirs.
        """
        return clients * self.largest_weight / weight * self.rounding

    def errors(self, clients: int, weight: float) -> tuple[float, ...]:
        """The same for each of ``leaves``, whose range is halved."""
        return tuple(ldexp(self.error(clients, weight), -k) for k in self.halvings)

    def share(self, weight: float) -> int:
        """A weight as it travels, from 1 to 65535, which stands for the largest. ValueError for one out of range."""
        if not 0 < weight <= self.largest_weight:  # which it is stays here: a client may tell the server of its error
            raise ValueError(f"weight: want more than 0 and at most {self.largest_weight:g}, the largest agreed on")
        return max(1, round(weight / self.largest_weight * LARGEST))

    def up(self, x: Array, weight: float, metrics: Array, sketches: Array, rng: np.random.Generator) -> Ring:
        """A client's vector: its encoding ``x`` (size,), weight, metrics (4,) and sketches, all as its own.

        sketches: of its change, not yet times its weight; rng: fresh, and of nobody else. ValueError for what has no
        place on the grid: NaN and infinity, a count that is negative or 2^40 and more, another weight.
        """
        share = self.share(weight)
        sizes = {"encoding": (x, self.size), "metrics": (metrics, len(SCALES)), "sketches": (sketches, self.sketches)}
        for name, (given, size) in sizes.items():
            if given.shape != (size,):
                raise ValueError(f"{name}: got shape {given.shape}; want ({size},)")
            if not np.isfinite(given).all():
                raise ValueError(f"{name}: got NaN or infinity; want finite numbers, for others have no place in a sum")
        counts = metrics * SCALES
        if counts.min() < 0 or counts.max() > MOST:
            raise ValueError("metrics: want a loss from 0 to 2^30, and counts from 0 to 2^40")
        part = factor = share / LARGEST
        if self.clip is not None:
            factor = part * (self.clip / max(self.clip, _norm(x.astype(np.float64))))
        out = np.empty(self.length, np.uint32)
        cut = sum(self._place(x[a:b], factor, k, rng, out[a:]) for a, b, k in self._parts())
        cut += self._place(sketches, part, 0, rng, out[self.size :])
        numbers = self._split(share, WEIGHT_BITS)
        for count in [*map(round, counts), cut]:
            numbers += self._split(count, COUNT_BITS)
        out[self._begin :] = numbers
        return out

    def down(self, total: Ring) -> tuple[Array, float, Array]:
        """The weighted mean (size,), the weight, and the sums of metrics and sketches (4 + m,), of a sum of vectors.

        ProtocolError for a sum that clients who keep to the grid can't have: then one of them has not.
        """
        share, *counts, _ = self._numbers(total)
        weight = share / LARGEST * self.largest_weight
        sums = _signed(total[: self._begin], self.modulus)
        most = self.cohort * self.steps
        if sums.min() < -most or sums.max() > most:
            raise ProtocolError("the sum holds numbers that no sum of this cohort has: a client left the grid")
        mean = sums[: self.size] * (self.rounding * LARGEST / share)
        for start, end, halvings in self._parts():
            mean[start:end] *= ldexp(1.0, -halvings)
        around = self.error(self.cohort, weight) * sqrt(sum(ldexp(b - a, -2 * k) for a, b, k in self._parts()))
        if self.clip is not None and (length := _norm(mean)) > self.clip + around:
            raise ProtocolError(
                f"the mean has norm {length:.7g}; want at most {self.clip:g} (channel.clip): a client has not clipped"
            )
        return (
            mean,
            weight,
            np.concatenate([np.array(counts) / SCALES, sums[self.size :] * (self.rounding * self.largest_weight)]),
        )

    def saturated(self, total: Ring) -> int:
        """How many numbers of all clients were cut at the range: more than a few, and the mean is not what they did."""
        return self._numbers(total)[-1]

    @property
    def _begin(self) -> int:
        """Where the whole numbers begin."""
        return self.size + self.sketches

    def _limbs(self, bits: int) -> int:
        return -(-bits // (self.bits - 1))

    def _split(self, number: int, bits: int) -> list[int]:
        """A number of so many bits in base S + 1, the last digit first: each of them is a step of the grid."""
        return [number >> i * (self.bits - 1) & self.steps for i in range(self._limbs(bits))]

    def _numbers(self, total: Ring) -> list[int]:
        """The sums of the weights, of the four counts and of ``saturated``."""
        if total.shape != (self.length,) or total.dtype != np.uint32:
            raise ValueError(f"total: got {total.dtype} of shape {total.shape}; want uint32 of ({self.length},)")
        digits = total[self._begin :].tolist()
        if max(digits) > self.cohort * self.steps:  # a negative one is near the end of the ring
            raise ProtocolError("the sum holds counts that no sum of this cohort has: a client left the grid")
        numbers: list[int] = []
        for bits in (WEIGHT_BITS, *[COUNT_BITS] * (len(SCALES) + 1)):
            mine, digits = digits[: self._limbs(bits)], digits[self._limbs(bits) :]
            numbers.append(sum(x << i * (self.bits - 1) for i, x in enumerate(mine)))
        if not 1 <= numbers[0] <= self.cohort * LARGEST:
            raise ProtocolError(f"the sum has a weight of {numbers[0]} steps: a client left the grid")
        return numbers

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        """Where numbers that have one range begin and end, and how often it is halved."""
        end, leaves = 0, self.leaves or (self.size,)
        for halvings, alike in groupby(range(len(leaves)), (self.halvings or (0,)).__getitem__):
            start, end = end, end + sum(leaves[i] for i in alike)
            yield start, end, halvings

    def _place(self, x: Array, factor: float, halvings: int, rng: np.random.Generator, out: Ring) -> int:
        """Write ``x · factor`` on the grid to the beginning of ``out``; how many were cut at the range, so halved."""
        cut, most = 0, ldexp(self.range, -halvings)
        for start in range(0, len(x), CHUNK):
            y = x[start : start + CHUNK].astype(np.float64) * factor
            cut += len(y[np.abs(y) > most])
            steps = np.floor(y.clip(-most, most) * (self.steps / most) + rng.random(len(y)))
            # S + U is rounded up to S + 1 where U is nearly 1 and S so large that fp64 has no room between.
            whole = steps.clip(-self.steps, self.steps).astype(np.int64)
            out[start : start + len(y)] = whole & (1 << self.modulus) - 1
        return cut


@dataclass(frozen=True, slots=True)
class RingChannel:
    """Clip, weigh, round to a grid, and add modulo 2^m: what secure aggregation carries.

    clip: the l2 norm that a client scales its vector down to, none if not set; range: the largest number that a vector
    times its share of the largest weight may hold, beyond which it is cut, and counted; modulus: m, and so many bits a
    number travel; bits: of a number before it is added to others, by default as many as the cohort has room for;
    scales: whether each tensor's range follows its changes from round to round ("tensor"), or all have one ("one").
    """

    clip: float | None = None
    range: float = 4.0
    modulus: int = 32
    bits: int | None = None
    scales: Literal["tensor", "one"] = "tensor"

    def __post_init__(self) -> None:
        if self.clip is not None and not (self.clip > 0 and isfinite(self.clip)):
            raise ValueError(f"clip: got {self.clip}; want more than 0 and finite, or leave it out")
        if not (self.range > 0 and isfinite(self.range)):
            raise ValueError(f"range: got {self.range}; want more than 0 and finite")
        if self.modulus not in MODULI:
            raise ValueError(f"modulus: got {self.modulus}; want one of {', '.join(map(str, MODULI))}")
        if self.bits is not None and not 2 <= self.bits <= self.modulus:
            raise ValueError(f"bits: got {self.bits}; want at least 2 and at most the modulus, {self.modulus}")

    @property
    def number_bytes(self) -> int:
        """What a number of a vector takes on the wire."""
        return self.modulus >> 3

    def over(
        self,
        cohort: int,
        size: int,
        sketches: int,
        largest_weight: float,
        leaves: tuple[int, ...] = (),
        halvings: tuple[int, ...] = (),
    ) -> Grid:
        """The grid for a cohort and its vectors. ValueError where their sum could wrap.

        leaves: numbers of each tensor; halvings: of the range for each of them, none at all where nothing is given.
        """
        bits = widest(self.modulus, cohort) if self.bits is None else self.bits
        leaves = leaves if self.scales == "tensor" else ()
        each = (leaves, halvings or (0,) * len(leaves))
        return Grid(self.modulus, bits, self.range, self.clip, cohort, size, sketches, largest_weight, *each)


def widest(modulus: int, cohort: int) -> int:
    """The most bits with which the sum of a cohort can't wrap: cohort · (2^(bits − 1) − 1) ≤ 2^(modulus − 1) − 1."""
    return (((1 << modulus - 1) - 1) // max(1, cohort) + 1).bit_length()


def _signed(numbers: NDArray[Any], modulus: int) -> NDArray[np.int32]:
    """Elements of Z_2^m from −2^(m − 1) on, in an array of their own."""
    signed = (numbers << 32 - modulus).view(np.int32)
    signed >>= 32 - modulus
    return signed


def _norm(x: Array) -> float:
    return sqrt(x @ x)
