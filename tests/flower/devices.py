"""Kits of a few bytes, and a fleet of devices that each lack them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from flwr.app import Message
from typing_extensions import override

from fedpeft.flower import Fleet, InProcessGrid, KitMissingError, Participant, Shelf, Shipping, muster
from fedpeft.flower.apps import answer
from fedpeft.flower.inprocess import NodeConfig
from fedpeft.flower.kits import KIT_QUERY
from fedpeft.flower.vault import Vault
from fedpeft.rules import FactorMean
from tests.flower.grids import Clock
from tests.flower.linear import participant

LARGE = 700_000


def make_kit(folder: Path, seed: int = 0) -> str:
    """A kit of one large file, a small one and an empty one; its digest."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    contents = {"base.safetensors": rng.bytes(LARGE), "step.onnx": b"graph", "chat_template.jinja": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {name: [sha256(x).hexdigest(), len(x)] for name, x in contents.items()}
    text = json.dumps({"files": files, "seed": seed}).encode()
    (folder / "kit.json").write_bytes(text)
    return sha256(text).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder, by name."""
    return {x.name: x.read_bytes() for x in folder.iterdir()}


@dataclass
class Devices(InProcessGrid):
    """Nodes 1 to N, each with a shelf of its own, that take part once the kit of this digest is on it.

    spoil: what is done to messages of the kit on their way, by the number that each has among all of them: the messages
    that then arrive. gone: nodes that are no longer there.
    """

    folder: Path
    digest: str
    count: int
    spoil: Mapping[int, str] = field(default_factory=dict)
    has: str = ""
    gone: set[int] = field(default_factory=set)
    brought: list[tuple[int, int]] = field(default_factory=list)
    most: int = 0
    answered: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        InProcessGrid.__init__(self, self._serve, [{"partition-id": i} for i in range(self.count)])

    def shelf(self, config: NodeConfig) -> Shelf:
        return Shelf(self.folder / str(config["partition-id"]))

    def _serve(self, messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterable[Message]:
        self.most = max(self.most, sum(x.metadata.message_type == KIT_QUERY for x in messages))
        for message in messages:
            node = message.metadata.dst_node_id
            config = nodes[node]

            def build(settings: str, said: NodeConfig, here: NodeConfig = config) -> Participant:
                if self.shelf(here).kit(self.digest) is None:
                    raise KitMissingError(self.digest, self.has)
                return participant()

            what = ""
            if message.metadata.message_type == KIT_QUERY:
                what = self.spoil.get(len(self.brought), "")
                self.brought.append((node, len(message.content["buffer"]["0"].data)))  # type: ignore[index,union-attr]
            if what == "lost" or node in self.gone:
                continue
            if what == "vanish":
                self.gone.add(node)
                continue
            # In a process of its own, as Flower has it: nothing but the shelf lasts.
            replies = list(
                answer(build, [message], {node: {**config, "n": len(self.brought)}}, Vault(), self._of(node))
            )
            if what == "twice":
                replies = list(answer(build, [message], {node: config}, Vault(), self._of(node)))
            if what == "rots":
                for part in self.shelf(config).folder.glob("*.part/base.safetensors.part"):
                    part.write_bytes(bytes(part.stat().st_size))
            yield from replies

    def _of(self, node: int):  # type: ignore[no-untyped-def]
        return lambda config: self.shelf({"partition-id": node - 1})

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(message_ids)
        assert not self.answered & set(wanted), "a SuperLink has no second answer to a message"
        replies = InProcessGrid.pull_messages(self, wanted)
        self.answered |= {x.metadata.reply_to_message_id for x in replies}
        return replies

    @override
    def get_node_ids(self) -> Sequence[int]:
        return [node for node in range(1, self.count + 1) if node not in self.gone]


@dataclass
class World:
    """A muster of devices over a grid that ships, and what was said of it."""

    devices: Devices
    shipping: Shipping
    said: list[str]
    clock: Clock
    fleet: Fleet | None = None

    def muster(self, clients: int, patience: float = 60.0, least: int = 1) -> Fleet:
        grid, clock = self.shipping, self.clock
        self.fleet = muster(grid, FactorMean(), "{}", clients, 10.0, True, clock, clock.sleep, patience, least=least)
        return self.fleet


def world(folder: Path, count: int, wants: str = "", **devices: object) -> World:
    """Devices that lack a kit which is there. wants: the digest that they ask for, if it is another."""
    digest = make_kit(folder / "kit")
    clock, said = Clock(), list[str]()
    nodes = Devices(folder / "devices", wants or digest, count, **devices)  # type: ignore[arg-type]
    return World(nodes, Shipping(nodes, folder / "kit", said.append, clock), said, clock)
