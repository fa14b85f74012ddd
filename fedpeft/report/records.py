"""What a run writes down: one record for the run, each round, each baseline, its devices' memory and the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self, TypeAlias

from fedpeft.report.devices import MemoryRecord
from fedpeft.report.fields import Fields
from fedpeft.report.people import ClientData
from fedpeft.report.sessions import SecureRecord
from fedpeft.report.strict import Json, finite
from fedpeft.report.visits import as_rows, of_rows
from fedpeft.rounds import Exactness, Metrics, Visit

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Score:
    """loss: per prediction; accuracy: share of predictions that were right, None where not measured; examples: rows."""

    loss: float | None = None
    accuracy: float | None = None
    examples: int | None = None

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """The score that sums of metrics amount to."""
        return cls(finite(metrics.mean_loss), finite(metrics.accuracy), round(metrics.examples))

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(x.number("loss"), x.number("accuracy"), x.whole("examples"))

    def json(self) -> dict[str, Json]:
        return {"loss": self.loss, "accuracy": self.accuracy, "examples": self.examples}


@dataclass(frozen=True, slots=True)
class Scores:
    """Over all predictions of all clients, and of each client by itself."""

    loss: float | None = None
    accuracy: float | None = None
    clients: Mapping[int, Score] = field(default_factory=dict[int, Score])

    @classmethod
    def of(cls, clients: Mapping[int, Metrics]) -> Self:
        """Pooled and single scores from each client's metrics."""
        pooled = Score.of(sum(clients.values(), Metrics()))
        return cls(pooled.loss, pooled.accuracy, {n: Score.of(clients[n]) for n in sorted(clients)})

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(x.number("loss"), x.number("accuracy"), _scores(x))

    def json(self) -> dict[str, Json]:
        return {"loss": self.loss, "accuracy": self.accuracy, "clients": _named(self.clients)}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What was run. clients: all of them, or a sample of the ``population``; bytes_per_round: of one client, up and
    down; task: "classify", "image", or "lm", where accuracy is of next tokens; labels: the names of the classes in
    order; command: what makes this run again; security: the label of its secure aggregation, empty in the clear.
    """

    name: str
    settings: Mapping[str, Json] = field(default_factory=dict[str, Json])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    clients: Mapping[int, ClientData] = field(default_factory=dict[int, ClientData])
    population: int = 0
    bytes_per_round: float | None = None
    task: str = ""
    labels: tuple[str, ...] = ()
    command: str = ""
    started: float | None = None
    security: Mapping[str, Json] = field(default_factory=dict[str, Json])

    @classmethod
    def read(cls, x: Fields) -> Self:
        clients = {int(n): ClientData.read(c) for n, c in x.section("clients").sections().items()}
        return cls(
            name=x.text("name"),
            settings=x.section("settings").values,
            versions=x.section("versions").texts(),
            clients=dict(sorted(clients.items())),
            population=x.whole("population") or len(clients),
            bytes_per_round=x.number("bytes_per_round"),
            task=x.text("task"),
            labels=tuple(x.texts_in("labels")),
            command=x.text("command"),
            started=x.number("started"),
            security=x.section("security").values,
        )

    def json(self) -> dict[str, Json]:
        return {
            "kind": "run",
            "name": self.name,
            "settings": self.settings,
            "versions": self.versions,
            "clients": {str(n): c.json() for n, c in self.clients.items()},
            "population": self.population or len(self.clients),
            "bytes_per_round": self.bytes_per_round,
            "task": self.task,
            "labels": self.labels,
            "command": self.command,
            "started": self.started,
            **({"security": self.security} if self.security else {}),
        }


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One round. round: counts from 1, as the checkpoint written after it does; timeline: (client, start, end) in
    seconds since the round began; started: Unix time; bytes and seconds: of this round alone; staleness: of each
    survivor's answer, in rounds; exactness: errors of the server's change. In virtual time: simulated, seconds from the
    run's start to the round's end; visits, what became of each message to a client. secure: what its secure
    aggregation cost.
    """

    round: int
    asked: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()
    refused: tuple[tuple[int, str], ...] = ()
    train: Score | None = None
    validation: Scores | None = None
    central: Score | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    seconds_training: float | None = None
    timeline: tuple[tuple[int, float, float], ...] = ()
    started: float | None = None
    staleness: tuple[int, ...] = ()
    simulated: float | None = None
    visits: tuple[Visit, ...] = ()
    exactness: Exactness | None = None
    secure: SecureRecord | None = None

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(
            round=x.need_whole("round"),
            asked=tuple(int(c) for c in x.numbers("asked")),
            survivors=tuple(int(c) for c in x.numbers("survivors")),
            refused=tuple(x.reasons("refused")),
            train=Score.read(x.section("train")) if x.has("train") else None,
            validation=Scores.read(x.section("validation")) if x.has("validation") else None,
            central=Score.read(x.section("central")) if x.has("central") else None,
            bytes_up=x.whole("bytes_up") or 0,
            bytes_down=x.whole("bytes_down") or 0,
            seconds=x.number("seconds") or 0.0,
            seconds_training=x.number("seconds_training"),
            timeline=tuple((int(c), start, end) for c, start, end in x.rows("timeline", 3)),
            started=x.number("started"),
            staleness=tuple(int(n) for n in x.numbers("staleness")),
            simulated=x.number("simulated"),
            visits=of_rows(x.rows("visits", 5)),
            exactness=_exactness(x.section("exactness")) if x.has("exactness") else None,
            secure=SecureRecord.read(x.section("secure")) if x.has("secure") else None,
        )

    def json(self) -> dict[str, Json]:
        return {
            "kind": "round",
            "round": self.round,
            "asked": self.asked,
            "survivors": self.survivors,
            "refused": self.refused,
            "train": self.train.json() if self.train else None,
            "validation": self.validation.json() if self.validation else None,
            "central": self.central.json() if self.central else None,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "seconds_training": self.seconds_training,
            "timeline": self.timeline,
            "started": self.started,
            **({"staleness": self.staleness} if self.staleness else {}),
            **({"simulated": self.simulated} if self.simulated is not None else {}),
            **({"visits": as_rows(self.visits)} if self.visits else {}),
            **({"exactness": _errors(self.exactness)} if self.exactness else {}),
            **({"secure": self.secure.json()} if self.secure else {}),
        }


@dataclass(frozen=True, slots=True)
class BaselineRecord:
    """What the run is measured against. name: "base", "local", "central-training"; clients: on their own test sets."""

    name: str
    central: Score | None = None
    clients: Mapping[int, Score] = field(default_factory=dict[int, Score])
    seconds: float | None = None

    @classmethod
    def read(cls, x: Fields) -> Self:
        central = Score.read(x.section("central")) if x.has("central") else None
        return cls(x.text("name"), central, _scores(x), x.number("seconds"))

    def json(self) -> dict[str, Json]:
        return {
            "kind": "baseline",
            "name": self.name,
            "central": self.central.json() if self.central else None,
            "clients": _named(self.clients),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class FinalRecord:
    """The end of a run. central: on the central test set; test: on each client's own; bytes, seconds: of all rounds;
    tuned: on each client's own once more, after it has trained for itself.
    """

    rounds: int
    central: Score | None = None
    test: Scores | None = None
    seconds: float | None = None
    adapter_digest: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    tuned: Scores | None = None

    @classmethod
    def read(cls, x: Fields) -> Self:
        return cls(
            rounds=x.need_whole("rounds"),
            central=Score.read(x.section("central")) if x.has("central") else None,
            test=Scores.read(x.section("test")) if x.has("test") else None,
            seconds=x.number("seconds"),
            adapter_digest=x.text("adapter_digest"),
            bytes_up=x.whole("bytes_up") or 0,
            bytes_down=x.whole("bytes_down") or 0,
            tuned=Scores.read(x.section("tuned")) if x.has("tuned") else None,
        )

    def json(self) -> dict[str, Json]:
        return {
            "kind": "final",
            "rounds": self.rounds,
            "central": self.central.json() if self.central else None,
            "test": self.test.json() if self.test else None,
            "seconds": self.seconds,
            "adapter_digest": self.adapter_digest,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            **({"tuned": self.tuned.json()} if self.tuned else {}),
        }


Record: TypeAlias = RunRecord | RoundRecord | BaselineRecord | MemoryRecord | FinalRecord

KINDS: Mapping[str, type[Record]] = {
    "run": RunRecord,
    "round": RoundRecord,
    "baseline": BaselineRecord,
    "memory": MemoryRecord,
    "final": FinalRecord,
}


def _exactness(x: Fields) -> Exactness:
    return Exactness(x.number("overall") or 0.0, x.section("layers").floats())


def _errors(x: Exactness) -> Json:
    return {"overall": _short(x.overall), "layers": {n: _short(error) for n, error in x.layers.items()}}


def _short(x: float) -> float:
    """Four digits: more than the estimate has."""
    return float(f"{x:.4g}")


def _scores(x: Fields) -> dict[int, Score]:
    scores = {int(n): Score.read(c) for n, c in x.section("clients").sections().items()}
    return dict(sorted(scores.items()))


def _named(clients: Mapping[int, Score]) -> dict[str, Json]:
    return {str(n): score.json() for n, score in clients.items()}
