"""Small runs of tiny-bert under secure aggregation, in one process, with all that clients send written down."""

import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedpeft.adapters import Adapter
from fedpeft.config import Experiment, experiment
from fedpeft.errors import ProtocolError
from fedpeft.flower.packing import Parcel, unpack
from fedpeft.flower.sealed import pack_reply, unpack_reply, unpack_sealed
from fedpeft.report import History, RunFolder, history
from fedpeft.rounds import Done, Failed, Job, Metrics, Trainer, Trial
from fedpeft.rules import ServerState
from fedpeft.run import Lines, simulate
from fedpeft.secagg.messages import Envelope, Kind

CAP = 15
"""Examples that count at most: a weight of w of 15 travels as w · 4369 of 65535, so no weight is rounded."""

KINDS = ("secured", "capabilities", "error", "metrics", "term")


def rows(path: Path, counts: Sequence[int]) -> Path:
    """A table with so many rows of each client, to train on, of two classes that can be learnt."""
    owners = [client for client, count in enumerate(counts) for _ in range(count)]
    lines = [
        f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]},c{client:03d}"
        for i, client in enumerate(owners)
    ]
    path.write_text("text,label,client\n" + "\n".join(lines) + "\n", encoding="utf8")
    return path


def run_of(path: Path, **more: Mapping[str, Any] | int) -> Experiment:
    """One round, in the clear unless ``more`` says otherwise, of all clients of a table, whose ranks are 2 and 4."""
    own: dict[str, Any] = {
        "rounds": 1,
        "model": {"name": "tiny-bert"},
        "adapter": {"rank": 4, "alpha": 8},
        "ranks": {"name": "levels", "levels": [2, 4]},
        "data": {"name": str(path)},
        "partition": {"name": "natural", "least": 1},
        "split": {"central": 0, "validation": 0, "test": 0},
        "training": {"length": 8, "threads": 1, "lr": 5e-3, "steps": 2, "batch": 4},
        "weighting": {"name": "examples", "cap": CAP},
        "evaluation": {"clients": False, "central": False},
        "fleet": {"failures": 1},
        "baselines": {"base": False},
    }
    return experiment(own | more)


@dataclass
class Quiet(Lines):
    """Keeps the notes of a run, and prints nothing."""

    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def round(self, record: Any, rounds: int) -> None:
        pass


@dataclass(frozen=True)
class Ended:
    """What a run came to."""

    path: Path
    notes: tuple[str, ...]

    @property
    def history(self) -> History:
        return history(self.path)

    @property
    def state(self) -> ServerState:
        return RunFolder.open(self.path).checkpoints.load().state


def ended(found: Experiment, path: Path) -> Ended:
    """Run this."""
    view = Quiet()
    simulate(found, path, view)
    return Ended(path, tuple(view.notes))


@dataclass(frozen=True)
class Sent:
    """One answer of a client: buffer and manifest are all its bytes, as they arrive."""

    client: int
    kind: str
    buffer: bytes
    manifest: bytes
    parcel: Parcel

    @property
    def envelope(self) -> Envelope:
        """The protocol's message."""
        return Envelope.open(self.buffer)


@dataclass
class Wire:
    """All that clients answer, what they were asked, and all that they train.

    change: other messages of the protocol in place of theirs.
    """

    change: Callable[[int, bytes], bytes] = field(default=lambda client, message: message)
    sent: list[Sent] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)
    jobs: list[tuple[Job, Done]] = field(default_factory=list)

    @property
    def kinds(self) -> Counter[str]:
        """How many messages there are of each kind of the protocol."""
        return Counter(x.envelope.kind.name for x in self.sent if x.parcel.kind == "secured")

    def tap(self, monkeypatch: pytest.MonkeyPatch) -> "Wire":
        """Listen to simulated runs from now on."""
        module = sys.modules["fedpeft.run.simulate"]
        grid, participant = module.in_process, module.simulated

        def listened(build: Any, *more: Any) -> Any:
            made = grid(build, *more)
            handle = made._handler
            made._handler = lambda messages, nodes: (self._heard(x) for x in handle(self._told(messages), nodes))
            return made

        def watched(settings_json: str, node_config: Any) -> Any:
            here = participant(settings_json, node_config)
            return replace(here, trainer=Watched(here.trainer, self.jobs))

        monkeypatch.setattr(module, "in_process", listened)
        monkeypatch.setattr(module, "simulated", watched)
        return self

    def _told(self, messages: Sequence[Message]) -> Sequence[Message]:
        secure = [x for x in messages if x.metadata.message_type.endswith(".secure")]
        self.asked += [unpack_sealed(x.content).message for x in secure]
        return messages

    def _heard(self, reply: Message) -> Message:
        if not reply.has_content():  # Flower's own word on a node that is gone
            return reply
        client = reply.metadata.src_node_id - 1
        content = self._changed(client, reply.content)
        reply.content = content
        buffer, manifest = whole(content)
        sent = Sent(client, reply.metadata.message_type, buffer, manifest, unpack(content, *KINDS))
        self.sent.append(sent)
        return reply

    def _changed(self, client: int, content: RecordDict) -> RecordDict:
        try:
            return pack_reply(self.change(client, unpack_reply(content)))
        except ProtocolError:
            return content


def whole(content: RecordDict) -> tuple[bytes, bytes]:
    """All bytes of a record: its buffer and its manifest, inflated. There is nothing else in it."""
    assert set(content) == {"buffer", "manifest"}
    arrays, told = content["buffer"], content["manifest"]
    assert isinstance(arrays, ArrayRecord)
    assert isinstance(told, ConfigRecord)
    assert list(arrays) == list(told) == ["0"]
    array, deflated = arrays["0"], told["0"]
    assert isinstance(deflated, bytes)
    assert (array.stype, array.dtype, tuple(array.shape)) == ("fedpeft", "uint8", (len(array.data),))
    inflate = zlib.decompressobj()
    manifest = inflate.decompress(deflated)
    assert inflate.eof
    assert inflate.unused_data == b""
    assert json.loads(manifest).keys() == {"schema", "kind", "facts", "tensors", "digest"}
    return array.data, manifest


@dataclass(frozen=True)
class Watched:
    """A trainer whose jobs and results are written down."""

    trainer: Trainer
    jobs: list[tuple[Job, Done]]

    @property
    def base(self) -> str:
        return self.trainer.base

    def start(self) -> Adapter:
        return self.trainer.start()

    def train_many(self, jobs: Sequence[Job]) -> Iterator[Done | Failed]:
        for job, done in zip(jobs, self.trainer.train_many(jobs), strict=True):
            if isinstance(done, Done):
                self.jobs.append((job, done))
            yield done

    def evaluate_many(self, trials: Sequence[Trial]) -> Iterator[Metrics | Failed]:
        return self.trainer.evaluate_many(trials)


def spoils(client: int, message: bytes, cheat: int) -> bytes:
    """What a client sends, but of one the shares that it deals to others don't open."""
    if client != cheat or message[0] != Kind.SHARES:
        return message
    spoilt = bytearray(message)
    for at in range(18, 18 + 8 * 84, 84):  # of one pass, what is sealed for one holder is 84 bytes
        spoilt[at] ^= 1
    return bytes(spoilt)
