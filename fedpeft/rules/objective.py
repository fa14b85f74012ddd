"""What a rule adds to what its clients minimise."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedpeft.adapters import Tensors


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """A penalty and a shift of the gradient; neither by default.

    penalty: λ of the term ``λ · Σ ‖b[:, cut:]‖ · ‖a[cut:]‖`` (Frobenius norms) over the layers in ``cuts``, which has
    for each the direction where its tail begins. Where one of the norms is zero, the other's gradient counts as zero.
    shift: what is added to every step's gradient, by trained tensor, in the shapes of the adapter that the client
    starts from. It is added after the gradient is clipped, so that clipping takes nothing of it.
    """

    penalty: float = 0.0
    cuts: Mapping[str, int] = field(default_factory=dict)
    shift: Tensors = field(default_factory=dict)


PLAIN = Objective()
"""The loss, and nothing else."""
