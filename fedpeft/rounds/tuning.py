"""What a client trains for itself alone once the run is over, and is evaluated with.

Either it trains on from the adapter that the run ended with, or it leaves that as it is and trains a second, personal
one beside it (dual). Source of the latter: Yang et al., arXiv:2403.19211, section 4 (FedDPA-F). Its weights for each
input, by how much that is like what the client has trained on, are not here: one ``mix`` is for all.
Both factors are trained, whatever the run's rule trains: nobody averages them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.adapters import Adapter, LowRank
from fedpeft.rounds.trainer import Job, Trial


@dataclass(frozen=True, slots=True, eq=False)
class Tuned:
    """One client's training for itself, and what comes of it.

    shared: the adapter that the run ended with, the client's own parts in place; mix: how much of what is trained
    counts beside it, None where that takes its place.
    """

    job: Job
    shared: Adapter
    mix: float | None = None

    def trial(self, trained: Adapter) -> Trial:
        """The evaluation on the client's test rows, of what it has trained."""
        if self.mix is None:
            return Trial(self.job.client, "test", trained, self.job.tail)
        layers = {n: replace(x, b=self.mix * x.b) for n, x in trained.layers.items()}
        shared = self.shared.dense
        dense = {n: (1 - self.mix) * shared[n] + self.mix * x for n, x in trained.dense.items()}
        return Trial(self.job.client, "test", replace(trained, layers=layers, dense=dense), self.job.tail)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How clients train for themselves once the run is over.

    dual: a personal adapter beside the shared one, which stays as it is, and not on from it; mix: then, how much of
    the personal one counts when it is evaluated: 0 is the shared one alone, 1 both in full. Leaves that are no
    low-rank layers, such as a head, there can only be one of: they are trained from the shared ones, and mixed.
    """

    dual: bool = False
    mix: float = 1.0

    def of(
        self, client: int, round: int, seed: int, shared: Adapter, tail: Mapping[str, LowRank], start: Adapter
    ) -> Tuned:
        """One client's. tail: what runs frozen beside ``shared``; start: the adapter before any training, whose rows of
        a a personal one begins with, as many as ``shared`` has, with b zero.
        """
        if not self.dual:
            return Tuned(Job(client, round, seed, shared, tail=tail), shared)
        layers = {
            n: LowRank(start.layers[n].cut(x.rank).a, np.zeros_like(x.b), x.scale) for n, x in shared.layers.items()
        }
        beside = dict(tail) | {n: tail[n].join(x) if n in tail else x for n, x in shared.layers.items()}
        return Tuned(Job(client, round, seed, replace(shared, layers=layers), tail=beside), shared, self.mix)
