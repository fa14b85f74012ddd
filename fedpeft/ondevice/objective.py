"""What a rule adds to what its clients minimise, in numpy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from fedpeft.adapters import Adapter, Array, Tensors
from fedpeft.rules import Objective


def tail_gradients(a: Array, b: Array, cut: int) -> tuple[Array, Array]:
    """The gradients by a (r, k) and b (d, r) of ‖b[:, cut:]‖ · ‖a[cut:]‖, in Frobenius norms.

    Where one norm is zero so are both gradients.
    """
    slopes = np.zeros_like(a), np.zeros_like(b)
    left, right = a[cut:], b[:, cut:]
    sizes = float(np.linalg.norm(left)), float(np.linalg.norm(right))
    if all(sizes):
        slopes[0][cut:] = left * np.float32(sizes[1] / sizes[0])
        slopes[1][:, cut:] = right * np.float32(sizes[0] / sizes[1])
    return slopes


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """What an objective adds to the gradients of named values.

    penalty: λ; cuts: by layer, the direction where its tail begins; shifts: what is added, by name.
    """

    penalty: float
    cuts: Mapping[str, int]
    shifts: Tensors

    @classmethod
    def of(cls, objective: Objective, start: Adapter, trained: Tensors) -> Self:
        """The objective for a client that starts from ``start`` and trains these of its tensors.

        ValueError for a penalty on a factor that is not trained, and for a shift of what ``start`` lacks.
        """
        cuts = objective.tails(trained)
        shifts = {n: x.astype(np.float32) for n, x in objective.shift.items()}
        start.put(shifts)  # raises where they don't fit
        return cls(objective.penalty, cuts, {n: x for n, x in shifts.items() if n in trained})

    def penalise(self, gradients: Tensors, now: Tensors) -> None:
        """Add the penalty's gradients to these, in place."""
        for name, cut in self.cuts.items():
            parts = [f"{name}/{part}" for part in "ab"]
            slopes = tail_gradients(now[parts[0]], now[parts[1]], cut)
            for part, slope in zip(parts, slopes, strict=True):
                slope *= np.float32(self.penalty)
                np.add(gradients[part], slope, out=gradients[part])

    def shift(self, gradients: Tensors) -> None:
        """Add the shifts to these gradients, in place."""
        for name, x in self.shifts.items():
            np.add(gradients[name], x, out=gradients[name])
