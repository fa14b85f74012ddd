"""A fleet whose clients train with different things: torch or onnxruntime, the base in one format or another."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self, TypeVar

from fedpeft.adapters import Adapter, drawn, same
from fedpeft.config import Experiment
from fedpeft.config.runtimes import Runtime, check_format, dealt
from fedpeft.data import Federation
from fedpeft.errors import ConfigError
from fedpeft.flower.results import one_by_one
from fedpeft.rounds import Done, Failed, Job, Metrics, Trainer, Trial, derive
from fedpeft.training.kit import Kit
from fedpeft.training.settings import Training

Item = TypeVar("Item", Job, Trial)
Result = TypeVar("Result")


class Lent(Trainer, Protocol):
    """A trainer that can be of other clients, or have other settings, on the same base in memory."""

    def over(self, federation: Federation, training: Training) -> Self:
        """Such a trainer."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MixedTrainer:
    """A ``rounds.Trainer`` that gives each client's work to the trainer of its runtime.

    members: by runtime; runtime_of: a client's; central: the runtime that evaluates on the central test set. Results
    come in the order of the jobs. Each member has its own in one list, so that one that trains many at once does so
    here as well, and starts on them when the first of its results is due; one that breaks is no other's affair.
    """

    members: Mapping[Runtime, Lent]
    runtime_of: Callable[[int], Runtime]
    central: Runtime

    @classmethod
    def of(cls, members: Mapping[Runtime, Lent], runtime_of: Callable[[int], Runtime], central: Runtime) -> Self:
        """The fleet. ConfigError where two are not of one run: another base, or another adapter to begin with."""
        first = members[central]
        start = first.start()
        for runtime, other in members.items():
            if other is first:
                continue
            if other.base != first.base:
                raise ConfigError(
                    f"simulation.runtimes: {runtime} has base {other.base[:12]} and {central} {first.base[:12]}; want "
                    f"one base and one adapter in all: use the kit of this experiment, or model.formats that name both"
                )
            if name := _difference(start, other.start()):
                raise ConfigError(
                    f"simulation.runtimes: {runtime} and {central} begin with different adapters, first in {name}; "
                    f"want the same bit for bit: use the kit of this experiment, with this seed"
                )
        return cls(members, runtime_of, central)

    @property
    def base(self) -> str:
        """The fingerprint that all members share."""
        return self.members[self.central].base

    def start(self) -> Adapter:
        """The adapter before any training, which is the same in all members."""
        return self.members[self.central].start()

    def over(self, federation: Federation, training: Training) -> Self:
        """The fleet with other settings, or of other data of the same clients: each stays on its runtime."""
        return replace(self, members={name: x.over(federation, training) for name, x in self.members.items()})

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        """Train each job on its client's runtime."""
        return self._routed(jobs, lambda member, mine: member.train_many(mine))

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        """Evaluate each trial on its client's runtime."""
        return self._routed(trials, lambda member, mine: member.evaluate_many(mine))

    def _routed(
        self, items: Sequence[Item], run: Callable[[Lent, Sequence[Item]], Iterator[Result | Failed]]
    ) -> Iterator[Result | Failed]:
        where = [self.central if x.client is None else self.runtime_of(x.client) for x in items]
        going = {
            runtime: one_by_one(
                partial(run, self.members[runtime]), [x for x, at in zip(items, where, strict=True) if at == runtime]
            )
            for runtime in dict.fromkeys(where)
        }
        for runtime in where:
            yield next(going[runtime])


def mixed(found: Experiment, clients: int, load: Callable[[Runtime], Lent]) -> MixedTrainer:
    """The trainer of a simulated run's clients, as ``simulation.runtimes`` has it.

    load: what makes the trainer of a runtime; of torch on ``model.quantise``, which evaluates on the central test set,
    there is one in any case.
    """
    plain = Runtime("torch", found.model.quantise)

    def of(client: int) -> Runtime:  # one that there isn't is refused by the trainer, in its own words
        return runtime_of(found, client, clients) if 0 <= client < clients else plain

    return MixedTrainer.of({runtime: load(runtime) for runtime in (plain, *others(found))}, of, plain)


def others(found: Experiment) -> list[Runtime]:
    """What a simulated run's clients train with beside torch on ``model.quantise``, which is there in any case."""
    plain = Runtime("torch", found.model.quantise)
    named = (Runtime.of(name, found.model.quantise) for name in found.simulation.runtimes)
    return [x for x in named if x != plain]


def by_runtime(found: Experiment, clients: int, some: Sequence[int]) -> tuple[tuple[str, int], ...]:
    """How many of some of so many clients train with what; empty where all train with the same."""
    if not found.simulation.runtimes:
        return ()
    return tuple(sorted(Counter(str(runtime_of(found, client, clients)) for client in some).items()))


def runtime_of(found: Experiment, client: int, clients: int) -> Runtime:
    """What this one of so many simulated clients trains with."""
    if not found.simulation.runtimes:
        return Runtime("torch", found.model.quantise)
    return dealt(found.simulation.runtimes, found.model.quantise, client, clients, found.seed)


def _difference(one: Adapter, other: Adapter) -> str:
    """The first tensor in which two adapters differ; empty where they are the same."""
    if same(one, other):
        return ""
    mine, theirs = ({**x.tensors(), **{f"fixed/{n}": y for n, y in drawn(x).items()}} for x in (one, other))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or mine[name].tobytes() != theirs[name].tobytes():
            return name
    return "its scales"


def on_device(
    found: Experiment,
    federation: Federation,
    kit: Kit,
    quantise: str | None = None,
    frugal: bool | None = None,
) -> Lent:
    """A trainer on onnxruntime, from a kit. quantise: what it must hold the base in, if that was said;
    frugal: as ``OnnxTrainer.open`` has it.

    ConfigError for a kit that this run's clients can't train from.
    """
    from fedpeft.ondevice.trainer import OnnxTrainer

    held = kit.facts.quantise
    if quantise is not None and held != quantise:
        raise ConfigError(
            f"node-config: quantise is {quantise!r}, and the kit in {kit.folder} holds the base in {held!r}; want "
            f"quantise left out, or another kit"
        )
    check_format(found.model, held, f"the kit in {kit.folder} holds the base in {held!r}")
    if kit.facts.seed != derive(found.seed, "start"):
        raise ConfigError(
            f"seed: got {found.seed}; the kit in {kit.folder} was exported with another, and so begins with another "
            f"adapter and head; want the seed that it was exported with, or a kit of this experiment"
        )
    return OnnxTrainer.open(kit, found.training, federation, found.model, found.training.threads, found.adapter, frugal)
