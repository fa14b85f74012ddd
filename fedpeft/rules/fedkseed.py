"""FedKSeed: clients walk along directions that all know, by forward passes alone, and say how far they went.

Sources: Qin et al., arXiv:2312.06353, algorithm 1 (a pool of K seeds, and their accumulated moves as the model);
Malladi et al., arXiv:2305.17333, algorithm 1 (MeZO, a step of it). A step of a client, on one batch: draw one of the K
directions z, measure ``g = (L(w + εz) − L(w − εz)) / 2ε``, and move by ``−lr · g`` along z. So what it has trained is
``start + Σ movesⱼ zⱼ``, with K numbers that say all of it, and so is a mean of such clients.

- Exact: the server moves the adapter by the mean of the moves, and that is the mean of what clients trained to rounding
  (1e-6 where numbers are near 1), of the numbers themselves and not of the products ΔW, as in FedIT.
- Sent: K numbers up and K down, whatever the model and the rank: down travel all moves since the start, and the start
  once. Who receives them draws each direction that anyone has moved along, of one bit a trained number.
- A client needs the memory of inference, and no gradients: no backward pass, no optimiser, no activations are kept.
  So a rank is no limit of what it can train, and all train every direction.
- Unlike the papers, directions are of 1 and −1 and not normal, which numpy doesn't promise to draw alike in every
  version; both have the mean ``E g z = ∇L``. Only the adapter's tensors move, and directions are drawn with equal
  chances (not FedKSeed-Pro). Whatever is trained stays within the span of the K directions.
- Known defect of all such methods: of a step's length 1/√n is along the gradient, for n trained numbers, so that it
  takes many more steps than training by gradients, and the fewer numbers are trained the better.
"""

from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Layout, Pool, Tensors, Update, same, walk_of, walked
from fedpeft.rules.base import Broadcast, MeanRule, ServerState, Task

_MOVES = "moves"


@dataclass(frozen=True, slots=True)
class FedKSeed(MeanRule):
    """Average how far clients went along common directions, found by forward passes alone.

    size: K, how many directions there are; epsilon: ε, how far along one its slope is measured.
    """

    seed: int
    size: int = 1024
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        Pool(self.seed, self.size, self.epsilon)

    @property
    @override
    def pool(self) -> Pool:
        return Pool(self.seed, self.size, self.epsilon)

    @property
    @override
    def is_change(self) -> bool:
        return True

    @property
    @override
    def hides_ranks(self) -> bool:
        return True

    @override
    def layout(self, task: Task) -> Layout:
        return Layout(((_MOVES, (self.size,)),))

    @override
    def encode(self, update: Update, task: Task) -> Tensors:
        if update.moves is not None:
            return {_MOVES: update.moves}
        if not same(update.received, update.trained):
            raise ValueError("an update came without its moves; want a trainer that walks along the job's pool")
        return {_MOVES: np.zeros(self.size)}

    @override
    def decode(self, mean: Tensors, state: ServerState) -> ServerState:
        return state.next(walked(state.adapter, self.pool, mean[_MOVES]))

    @override
    def send(self, state: ServerState, rank: int) -> Broadcast:
        """All of the adapter, whatever the rank."""
        if walk_of(state.adapter) is None:
            state = replace(state, adapter=walked(state.adapter, self.pool, np.zeros(self.size)))
        return Broadcast(state.task, state.adapter, state.tail)

    @override
    def is_for(self, sent: Broadcast, rank: int) -> bool:
        return sent.adapter.spec == sent.task.spec
