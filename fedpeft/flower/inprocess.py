"""A Flower grid whose nodes all live in this process: the same messages, without a network."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias, overload

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from typing_extensions import override

NodeConfig: TypeAlias = Mapping[str, bool | int | float | str]
Handler: TypeAlias = Callable[[Sequence[Message], Mapping[int, NodeConfig]], Iterator[Message]]


@dataclass(frozen=True, slots=True)
class Alike(Sequence[NodeConfig]):
    """The configs of clients 0 to ``clients`` - 1, which differ in their numbers alone: each is made when asked for."""

    shared: NodeConfig
    clients: int

    def __len__(self) -> int:
        return self.clients

    @overload
    def __getitem__(self, index: int) -> NodeConfig: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[NodeConfig]: ...

    def __getitem__(self, index: int | slice) -> NodeConfig | Sequence[NodeConfig]:
        found = range(self.clients)[index]
        return self._config(found) if isinstance(found, int) else [self._config(i) for i in found]

    def _config(self, client: int) -> NodeConfig:
        return {**self.shared, "partition-id": client, "num-partitions": self.clients}


@dataclass(frozen=True, slots=True)
class Numbered(Mapping[int, NodeConfig]):
    """Nodes 1 to N by number, over the sequence of their configs."""

    configs: Sequence[NodeConfig]

    def __getitem__(self, node: int) -> NodeConfig:
        if not 1 <= node <= len(self.configs):
            raise KeyError(node)
        return self.configs[node - 1]

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self.configs) + 1))

    def __len__(self) -> int:
        return len(self.configs)


class InProcessGrid(Grid):
    """Nodes 1 to N, of which each has its own ``node_configs`` entry and all share one handler.

    Where the configs are ``Alike`` nothing here grows with their number. A pull starts the handler on all the messages
    asked for, and gives one reply; the next pull gives the next one. Messages that no later pull asks for are never
    handled.
    """

    def __init__(self, handler: Handler, node_configs: Sequence[NodeConfig]) -> None:
        self._handler = handler
        self._nodes: Mapping[int, NodeConfig] = Numbered(node_configs)
        self._is_alike = isinstance(node_configs, Alike)
        self._names = (str(n) for n in count(1))
        self._queue: dict[str, Message] = {}
        self._batch: set[str] = set()
        self._replies: Iterator[Message] = iter(())
        try:
            _ = TaskIdentity.run_id
        except RuntimeError:  # outside of Flower's own processes no message can be made without an identity
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    @property
    def is_alike(self) -> bool:
        """Whether node n is client n - 1, and what one node says of itself goes for all."""
        return self._is_alike

    @override
    def set_run(self, run: Run) -> None:
        raise NotImplementedError("an in-process grid has one run, and no record of it")

    @property
    @override
    def run(self) -> Run:
        raise NotImplementedError("an in-process grid has no record of its run")

    @override
    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @override
    def get_node_ids(self) -> Sequence[int]:
        return range(1, len(self._nodes) + 1)

    @override
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed: list[str] = []
        for message in messages:
            if message.metadata.dst_node_id not in self._nodes:
                continue
            name = next(self._names)
            message.metadata.__dict__["_message_id"] = name  # as Flower's own grids do: there is no public way
            self._queue[name] = message
            pushed.append(name)
        return pushed

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(dict.fromkeys(message_ids))
        if not self._batch.intersection(wanted):
            self._begin(wanted)
        reply = next(self._replies, None)
        if reply is None:
            self._batch.clear()
            return []
        self._batch.discard(reply.metadata.reply_to_message_id)
        return [reply]

    @override
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """All replies; there is nothing to wait for, so ``timeout`` is ignored."""
        names = self.push_messages(messages)
        return [reply for _ in names for reply in self.pull_messages(names)]

    def _begin(self, wanted: Sequence[str]) -> None:
        batch = [self._queue[name] for name in wanted if name in self._queue]
        self._queue.clear()
        self._batch = {message.metadata.message_id for message in batch}
        self._replies = self._handler(batch, self._nodes) if batch else iter(())
