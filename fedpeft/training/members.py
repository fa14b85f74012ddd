"""The state of the clients in a pool: a row of numbers each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpeft.adapters import Adapter, LowRank
from fedpeft.rounds import Job
from fedpeft.rules import Objective
from fedpeft.training.cores import CoreRows
from fedpeft.training.devices import Place
from fedpeft.training.objectives import shifts, tail_gradients
from fedpeft.training.optimise import RowOptimiser
from fedpeft.training.settings import Training
from fedpeft.training.stack import Stack


@dataclass(slots=True, eq=False)
class Members:
    """Rows of trained and of held numbers (a factor that is frozen in this round), gradients, and frozen paths.

    tails: by layer, a (rows, r, k) and b (rows, d, r) with the scale in it, padded with zeros to the largest rank;
    penalised: by layer, (rows, r), the penalty on the directions in a client's tail and 0 on the others.
    """

    stack: Stack
    optimiser: RowOptimiser
    held: Tensor
    is_trained: tuple[bool, ...]
    gradients: Tensor
    tails: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    penalised: dict[str, Tensor] = field(default_factory=dict)
    cores: CoreRows | None = None

    @classmethod
    def room(
        cls, stack: Stack, training: Training, place: Place, trains: str, rows: int, cores: CoreRows | None = None
    ) -> "Members":
        """Room for so many clients that train these factors ("a", "b", "ab") or ``cores``, and all dense leaves."""
        factors = {f"{x.name}/{part}" for x in stack.bridge.spec.layers for part in "ab" if part not in trains}
        is_trained = tuple(n not in (factors if cores is None else cores.held) for n in stack.names)
        all_sizes = _sizes(stack, cores)
        sizes = [sum(s for s, t in zip(all_sizes, is_trained, strict=True) if t is on) for on in (True, False)]
        trained, held = (torch.zeros(rows, n, device=place.device) for n in sizes)
        optimiser = RowOptimiser(trained, training)
        return cls(stack, optimiser, held, is_trained, torch.zeros_like(trained), cores=cores)

    @staticmethod
    def tails_of(jobs: Sequence[Job], rows: int, place: Place) -> dict[str, tuple[Tensor, Tensor]]:
        """Room for the frozen paths of these jobs, beside every layer that one of them has a path beside."""
        largest: dict[str, LowRank] = {}
        for job in jobs:
            largest |= {n: x for n, x in job.tail.items() if n not in largest or x.rank > largest[n].rank}
        return {
            name: (
                torch.zeros(rows, *x.a.shape, device=place.device),
                torch.zeros(rows, *x.b.shape, device=place.device),
            )
            for name, x in largest.items()
        }

    def begin(self, row: int, job: Job) -> None:
        """Give a row to the client of a job."""
        if self.cores is not None:
            self.cores.begin(row, job.start)
        shift = shifts(job.start, job.objective.shift) if job.objective.shift else None
        self.optimiser.begin(row, self._part(job.start, True), None if shift is None else self._part(shift, True))
        self.gradients[row] = 0
        self.held[row] = self._part(job.start, False)
        self._penalise(row, job.objective)
        for name, (a, b) in self.tails.items():
            a[row], b[row] = 0, 0
            if name in job.tail:
                tail = job.tail[name].pad(a.shape[1])
                a[row], b[row] = torch.tensor(tail.a), torch.tensor(tail.scale * tail.b)

    def put(self, rows: Tensor, width: int) -> Tensor:
        """Have the next pass run on these rows' clients; their trained numbers (k, n), whose ``grad`` it will fill."""
        trained = self.optimiser.values[rows].requires_grad_()
        sources = {True: trained, False: self.held[rows]}
        parts = {on: list(torch.split(x, self._sizes(on), dim=1)) for on, x in sources.items()}
        tensors = {
            name: self._whole(name, parts[on].pop(0), rows).reshape(len(rows), *shape)
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
            self.optimiser.step(index, self._with_penalty(index, self.gradients[index]))
            self.gradients[index] = 0

    def adapter(self, row: int, like: Adapter) -> Adapter:
        """What the client of a row has come to, with the ranks of ``like``."""
        sources = {True: self.optimiser.values[row], False: self.held[row]}
        parts = {on: list(torch.split(x, self._sizes(on))) for on, x in sources.items()}
        one, each = torch.tensor([row], device=self.held.device), zip(self.stack.names, self.is_trained, strict=True)
        whole = torch.cat([self._whole(name, parts[on].pop(0)[None], one).flatten() for name, on in each])
        return self.stack.adapter(whole.cpu().numpy(), like)

    def _sizes(self, on: bool) -> list[int]:
        return [size for size, t in zip(_sizes(self.stack, self.cores), self.is_trained, strict=True) if t is on]

    def _whole(self, name: str, numbers: Tensor, rows: Tensor) -> Tensor:
        """A tensor of the adapter for these rows (k, ...), from the numbers (k, n) that stand for it."""
        if self.cores is None or self.cores.size(name) is None:
            return numbers
        return self.cores.b(name, numbers, rows)

    def _part(self, adapter: Adapter, on: bool) -> Tensor:
        """The numbers of an adapter that are trained, or those that are held."""
        parts = torch.split(torch.from_numpy(self.stack.row(adapter)).to(self.held.device), list(self.stack.sizes))
        mine = [
            x if self.cores is None or self.cores.size(n) is None else self.cores.numbers(n, adapter).to(x)
            for n, x, t in zip(self.stack.names, parts, self.is_trained, strict=True)
            if t is on
        ]
        return torch.cat(mine) if mine else self.held.new_zeros(0)

    def _penalise(self, row: int, objective: Objective) -> None:
        """Note which directions of a row's layers are to have a penalty."""
        for x in self.stack.bridge.spec.layers:
            if x.name in self.penalised:
                self.penalised[x.name][row] = 0
            if objective.penalty and x.name in objective.cuts:
                if x.name not in self.penalised:
                    self.penalised[x.name] = self.held.new_zeros(len(self.held), x.rank)
                self.penalised[x.name][row, objective.cuts[x.name] :] = objective.penalty

    def _with_penalty(self, rows: Tensor, gradients: Tensor) -> Tensor:
        """These rows' gradients (k, n), which are changed in place, with those of each one's penalty."""
        names = [n for n, on in zip(self.stack.names, self.is_trained, strict=True) if on]
        now, slopes = (
            dict(zip(names, torch.split(x, self._sizes(True), dim=1), strict=True))
            for x in (self.optimiser.values[rows], gradients)
        )
        for name, all_rows in self.penalised.items():
            penalty = all_rows[rows]
            a = now[f"{name}/a"].reshape(len(rows), penalty.shape[1], -1)
            b = now[f"{name}/b"].reshape(len(rows), -1, penalty.shape[1])
            for part, slope in zip("ab", tail_gradients(a, b, (penalty > 0).to(a)), strict=True):
                slopes[f"{name}/{part}"] += penalty.amax(dim=1, keepdim=True) * slope.flatten(1)
        return gradients


def _sizes(stack: Stack, cores: CoreRows | None) -> list[int]:
    """How many numbers stand for each tensor of the adapter."""
    return [
        size if cores is None or (small := cores.size(name)) is None else small
        for name, size in zip(stack.names, stack.sizes, strict=True)
    ]
