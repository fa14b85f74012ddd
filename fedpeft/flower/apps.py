"""Flower's apps, made of our own parts: what ``flwr run``, a SuperNode and the in-process grid call.

Nothing here imports torch: that is left to ``build``, when a message has come.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpeft.errors import ConfigError
from fedpeft.flower.answers import pack_refusal
from fedpeft.flower.footprints import MEMORY_QUERY, Footprints, pack_footprint
from fedpeft.flower.inprocess import Alike, InProcessGrid, NodeConfig
from fedpeft.flower.kits import KIT_QUERY, KitMissingError, pack_lack
from fedpeft.flower.losses import Losses, losing
from fedpeft.flower.participant import Participant, refusal_of
from fedpeft.flower.requests import settings_of
from fedpeft.flower.secret import said_of
from fedpeft.flower.serve import serve
from fedpeft.flower.shelf import Shelf, answer_kit
from fedpeft.flower.vault import Vault

Build: TypeAlias = Callable[[str, NodeConfig], Participant]
ShelfOf: TypeAlias = Callable[[NodeConfig], Shelf]
CLIENT_KEYS = ("partition-id",)


def _no_shelf(config: NodeConfig) -> Shelf:
    raise ConfigError("node-config: this node takes no kit; want runtime='onnx'")


def client_app(build: Build, shelf: ShelfOf = _no_shelf) -> ClientApp:
    """A ClientApp whose node serves the client that its config's ``partition-id`` names.

    build: makes a participant from a message's settings (JSON) and the node's config, without its
    ``partition-id`` unless the node has ``data`` of its own. It is called once for each settings in a
    process, so the base model stays loaded. It must be importable by name, because Flower's simulation
    runtime pickles the app. shelf: where a node of this config puts kits that the coordinator sends, once ``build``
    has raised KitMissingError.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    @app.query(KIT_QUERY.partition(".")[2])
    def query_kit(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    @app.query(MEMORY_QUERY.partition(".")[2])
    def query_memory(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    @app.query("secure")
    def query_secure(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    @app.train("secure")
    def train_secure(message: Message, context: Context) -> Message:
        return _answer(build, shelf, message, context)

    return app


def server_app(main: Callable[[Grid, Mapping[str, bool | int | float | str]], None]) -> ServerApp:
    """A ServerApp that runs ``main`` with its grid and its run config."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(grid, context.run_config)

    return app


def in_process(
    build: Build,
    clients: int,
    config: NodeConfig | None = None,
    losses: Losses | None = None,
    shelf: ShelfOf = _no_shelf,
) -> InProcessGrid:
    """A grid of clients 0 to ``clients`` - 1 in this process, served by the same code as deployed ones.

    config: what all nodes have in their configs beside their number; losses: who vanishes in a round; shelf: see
    ``client_app``.
    """
    vault = Vault()

    def handle(messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        return answer(build, messages, nodes, vault, shelf)

    return InProcessGrid(handle if losses is None else losing(handle, losses.is_lost), Alike(config or {}, clients))


def answer(
    build: Build,
    messages: Sequence[Message],
    nodes: Mapping[int, NodeConfig],
    vault: Vault | None = None,
    shelf: ShelfOf = _no_shelf,
    notes: Footprints | None = None,
) -> Iterator[Message]:
    """Replies to messages to nodes of these configs, in order; those of one config and settings share a participant.

    vault: what these clients keep of secure sessions between their messages; shelf: see ``client_app``; notes: of the
    memory that their training takes, None where nothing is written down.
    """
    start = 0
    while start < len(messages):
        try:
            if messages[start].metadata.message_type == MEMORY_QUERY:
                client = client_of(nodes[messages[start].metadata.dst_node_id])
                found = None if notes is None else notes.of(client)
                yield Message(pack_footprint(found), reply_to=messages[start])
                start += 1
                continue
            if messages[start].metadata.message_type == KIT_QUERY:
                here = shelf(nodes[messages[start].metadata.dst_node_id])
                yield Message(answer_kit(here, messages[start].content), reply_to=messages[start])
                start += 1
                continue
            settings = settings_of(messages[start].content)
            stop = start + 1
            config = _shared(nodes[messages[start].metadata.dst_node_id])
            while (
                stop < len(messages)
                and _shared(nodes[messages[stop].metadata.dst_node_id]) == config
                and _same_settings(messages[stop], messages[start], settings)
            ):
                stop += 1
            participant = _participant(build, settings, config)
        except KitMissingError as missing:
            yield Message(_lack(missing, shelf, nodes[messages[start].metadata.dst_node_id]), reply_to=messages[start])
            start += 1
            continue
        except Exception as error:
            is_secure = messages[start].metadata.message_type.endswith(".secure")
            refusal = said_of(error) if is_secure else refusal_of(error)
            yield Message(pack_refusal(refusal), reply_to=messages[start])
            start += 1
            continue
        batch = messages[start:stop]
        yield from serve(participant, lambda m: client_of(nodes[m.metadata.dst_node_id]), batch, vault, notes)
        start = stop


def client_of(config: NodeConfig) -> int:
    """The client that a node's config names. Raises ConfigError if it names none."""
    client = config.get("partition-id")
    if type(client) is not int or client < 0:
        raise ConfigError(
            f"node-config: partition-id is {client!r}; want the client's number, 0 or more: "
            f"start the SuperNode with --node-config 'partition-id=0'"
        )
    return client


def _lack(missing: KitMissingError, shelf: ShelfOf, config: NodeConfig) -> RecordDict:
    """What a node answers that lacks the run's kit."""
    try:
        return pack_lack(replace(shelf(config).lacks(missing.digest), has=missing.has))
    except Exception as error:
        return pack_refusal(refusal_of(error))


def _answer(build: Build, shelf: ShelfOf, message: Message, context: Context) -> Message:
    """Not a closure, so that it is pickled by name and this module's cache lives in the process that runs it."""
    config = {message.metadata.dst_node_id: context.node_config}
    state = context.state
    return next(answer(build, [message], config, Vault.within(state), shelf, Footprints.within(state)))


def _shared(config: NodeConfig) -> tuple[tuple[str, bool | int | float | str], ...]:
    """What a participant depends on: not the client's number, unless the node has data of its own."""
    return tuple(sorted((k, v) for k, v in config.items() if k not in CLIENT_KEYS or "data" in config))


def _same_settings(message: Message, first: Message, settings: str) -> bool:
    return message.content is first.content or settings_of(message.content) == settings


@lru_cache(maxsize=2)
def _participant(build: Build, settings: str, config: tuple[tuple[str, bool | int | float | str], ...]) -> Participant:
    return build(settings, dict(config))
