"""The state of the clients in a pool: a row of numbers each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.adapters import Adapter
from fedpeft.rounds import Job
from fedpeft.training.devices import Place
from fedpeft.training.optimise import RowOptimiser
from fedpeft.training.settings import Training
from fedpeft.training.stack import Stack


@dataclass(slots=True, eq=False)
class Members:
    """Rows of trained and of held numbers (a factor that is frozen in this round), gradients, and frozen paths.

    tails: by layer, a (rows, r, k) and b (rows, d, r) with the scale in it, padded with zeros to the largest rank.
    """

    stack: Stack
    optimiser: RowOptimiser
    held: Tensor
    is_trained: tuple[bool, ...]
    gradients: Tensor
    tails: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def room(cls, stack: Stack, training: Training, place: Place, trains: str, rows: int) -> "Members":
        """Room for so many clients that train these factors ("a", "b", "ab") and all dense leaves."""
        factors = {f"{x.name}/{part}" for x in stack.bridge.spec.layers for part in "ab" if part not in trains}
        is_trained = tuple(n not in factors for n in stack.names)
        sizes = [sum(s for s, t in zip(stack.sizes, is_trained, strict=True) if t is on) for on in (True, False)]
        trained, held = (torch.zeros(rows, n, device=place.device) for n in sizes)
        return cls(stack, RowOptimiser(trained, training), held, is_trained, torch.zeros_like(trained))

    @staticmethod
    def tails_of(jobs: Sequence[Job], rows: int, place: Place) -> dict[str, tuple[Tensor, Tensor]]:
        """Room for the frozen paths of these jobs, which are beside the same layers."""
        room: dict[str, tuple[Tensor, Tensor]] = {}
        for name, x in jobs[0].tail.items():
            rank = max(job.tail[name].rank for job in jobs)
            room[name] = (
                torch.zeros(rows, rank, x.a.shape[1], device=place.device),
                torch.zeros(rows, x.b.shape[0], rank, device=place.device),
            )
        return room

    def begin(self, row: int, job: Job) -> None:
        """Give a row to the client of a job."""
        parts = torch.split(torch.from_numpy(self.stack.row(job.start)).to(self.held.device), list(self.stack.sizes))
        for on, put in ((True, self._train), (False, self._hold)):
            mine = [x for x, t in zip(parts, self.is_trained, strict=True) if t is on]
            put(row, torch.cat(mine) if mine else self.held.new_zeros(0))
        for name, (a, b) in self.tails.items():
            tail = job.tail[name].pad(a.shape[1])
            a[row] = torch.tensor(tail.a)
            b[row] = torch.tensor(tail.scale * tail.b)

    def put(self, rows: Tensor, width: int) -> Tensor:
        """Have the next pass run on these rows' clients; their trained numbers (k, n), whose ``grad`` it will fill."""
        trained = self.optimiser.values[rows].requires_grad_()
        sources = {True: trained, False: self.held[rows]}
        parts = {on: list(torch.split(x, self._sizes(on), dim=1)) for on, x in sources.items()}
        tensors = {
            name: parts[on].pop(0).reshape(len(rows), *shape)
            for name, shape, on in zip(self.stack.names, self.stack.shapes, self.is_trained, strict=True)
        }
        self.stack.put(tensors, len(rows), width, {n: (a[rows], b[rows]) for n, (a, b) in self.tails.items()})
        return trained

    def gather(self, rows: Tensor, gradients: Tensor) -> None:
        """Add the gradients (k, n) of a pass to those of the same optimiser step."""
        self.gradients.index_add_(0, rows, gradients)

    def step(self, rows: Sequence[int]) -> None:
        """An optimiser step of these rows, along the gradients gathered since their last one."""
        if rows:
            index = torch.tensor(rows, device=self.gradients.device)
            self.optimiser.step(index, self.gradients[index])
            self.gradients[index] = 0

    def adapter(self, row: int, like: Adapter) -> Adapter:
        """What the client of a row has come to, with the ranks of ``like``."""
        sources = {True: self.optimiser.values[row], False: self.held[row]}
        parts = {on: list(torch.split(x, self._sizes(on))) for on, x in sources.items()}
        whole = torch.cat([parts[on].pop(0) for on in self.is_trained])
        return self.stack.adapter(whole.cpu().numpy(), like)

    def _sizes(self, on: bool) -> list[int]:
        return [size for size, t in zip(self.stack.sizes, self.is_trained, strict=True) if t is on]

    def _train(self, row: int, values: Tensor) -> None:
        self.optimiser.begin(row, values)
        self.gradients[row] = 0

    def _hold(self, row: int, values: Tensor) -> None:
        self.held[row] = values
