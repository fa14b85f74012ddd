"""What a rule adds to what its clients minimise."""

from collections.abc import Collection, Mapping
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

    def tails(self, trained: Collection[str]) -> Mapping[str, int]:
        """Where the penalised tails begin, by layer: none without a penalty. trained: the names of what is trained.

        ValueError for a penalty on a factor that is not trained.
        """
        cuts = self.cuts if self.penalty else {}
        for name in (f"{layer}/{part}" for layer in cuts for part in "ab"):
            if name not in trained:
                raise ValueError(f"a penalty on {name}, which is not trained; want both factors trained, or no penalty")
        return cuts


PLAIN = Objective()
"""The loss, and nothing else."""
