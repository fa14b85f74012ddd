"""Hostile clients of a simulation: they train as all do, and send something else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.adapters import Adapter, Array
from fedpeft.config import Experiment
from fedpeft.flower import Participant
from fedpeft.rounds import Done, Failed, Job, Metrics, Trainer, Trial, derive, place
from fedpeft.rules import Rule
from fedpeft.run.node import Scalar
from fedpeft.run.node import participant as honest
from fedpeft.run.workshop import workshop

_MOVES = "moves"


def is_hostile(found: Experiment, client: int, clients: int) -> bool:
    """Whether this one of so many clients is hostile, all through the run."""
    terms = found.simulation.hostile
    if terms is None:
        return False
    return place(client, clients, derive(found.seed, "hostile")) < terms.count(clients)


def simulated(settings_json: str, node_config: Mapping[str, Scalar]) -> Participant:
    """What serves a simulated node: as ``node.participant``, with the hostile clients of the experiment."""
    found = honest(settings_json, node_config)
    here = workshop(settings_json)
    if here.found.simulation.hostile is None:
        return found
    return replace(found, trainer=Attacker(found.trainer, here.found, here.federation.clients))


@dataclass(frozen=True, slots=True, eq=False)
class Attacker:
    """A trainer whose results are another one's, but for what hostile clients send.

    What they keep for themselves, and what they say of their training, is as it was trained.
    """

    trainer: Trainer
    found: Experiment
    clients: int

    @property
    def base(self) -> str:
        return self.trainer.base

    def start(self) -> Adapter:
        return self.trainer.start()

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train each job; a hostile client's result is its attack."""
        for job, done in zip(jobs, self.trainer.train_many(jobs), strict=True):
            is_attack = isinstance(done, Done) and is_hostile(self.found, job.client, self.clients)
            yield self._attack(job, done) if is_attack and isinstance(done, Done) else done

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        return self.trainer.evaluate_many(trials)

    def _attack(self, job: Job, done: Done) -> Done:
        if job.pool is not None and done.moves is not None:
            moves = self._lie(job, {_MOVES: done.moves})[_MOVES]
            trained = job.start.put(job.pool.moved(job.start.tensors(), moves))
            return replace(done, trained=trained, moves=moves)
        now, was = done.trained.tensors(), job.start.tensors()
        names = moved(job.start, done.trained, self.found.rule)
        change: dict[str, Array] = {n: np.subtract(now[n], was[n], dtype=np.float64) for n in names}
        lie = {n: (was[n] + x).astype(was[n].dtype) for n, x in self._lie(job, change).items()}
        return replace(done, trained=done.trained.put(lie))

    def _lie(self, job: Job, change: dict[str, Array]) -> dict[str, Array]:
        """What a hostile client says that it has done, in place of this."""
        terms = self.found.simulation.hostile
        assert terms is not None, "nobody is hostile else"
        if terms.attack == "noise":
            norm = float(np.sqrt(sum(np.sum(x**2) for x in change.values())))
            change = noise(change, norm, derive(job.seed, "hostile"))
        strength = terms.strength if terms.attack == "noise" else -terms.strength
        return {n: strength * x for n, x in change.items()}


def moved(start: Adapter, trained: Adapter, rule: Rule) -> list[str]:
    """The names of the tensors that training has changed and that don't stay on the client."""
    kept, now = rule.personal(start.spec), trained.tensors()
    return [name for name, was in start.tensors().items() if name not in kept and not np.array_equal(was, now[name])]


def noise(like: Mapping[str, Array], norm: float, seed: int) -> dict[str, Array]:
    """Gaussian tensors of these shapes that have this norm together."""
    rng = np.random.default_rng(seed)
    drawn = {n: rng.standard_normal(x.shape) for n, x in like.items()}
    length = float(np.sqrt(sum(np.sum(x**2) for x in drawn.values()))) or 1.0
    return {n: x * (norm / length) for n, x in drawn.items()}
