"""The apps and the in-process grid, as Flower's runtimes use them."""

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.flower import InProcessGrid, Participant, client_app, in_process, server_app
from fedpeft.flower.answers import unpack_capabilities, unpack_refusal
from fedpeft.flower.inprocess import NodeConfig
from fedpeft.flower.requests import Query, pack_query
from tests.flower.linear import participant

BUILT: list[tuple[str, dict[str, bool | int | float | str]]] = []


def build(settings: str, config: Mapping[str, bool | int | float | str]) -> Participant:
    BUILT.append((settings, dict(config)))
    return participant()


def query(settings: str, node: int = 1) -> Message:
    in_process(build, 1)  # gives messages an identity
    return Message(pack_query(Query(settings)), node, "query")


def context(**config: bool | int | float | str) -> Context:
    return Context(1, 1, {k.replace("_", "-"): v for k, v in config.items()}, RecordDict(), {})


def test_the_packages_own_apps_import_no_torch() -> None:
    code = (
        "import sys, fedpeft.flower, clients.app, server.app\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'ray', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_client_app_answers_for_the_client_that_its_node_config_names() -> None:
    app = client_app(build)
    for number in (0, 4):
        reply = app(query(f"one-{number}"), context(partition_id=number, num_partitions=5))
        assert unpack_capabilities(reply.content).client == number


def test_a_participant_is_built_once_for_each_settings_whatever_the_client() -> None:
    BUILT.clear()
    app = client_app(build)
    for number in (0, 1, 2, 0):
        app(query("same"), context(partition_id=number, num_partitions=3))
    app(query("other"), context(partition_id=0, num_partitions=3))
    assert BUILT == [("same", {"num-partitions": 3}), ("other", {"num-partitions": 3})]


def test_a_node_with_data_of_its_own_has_a_participant_of_its_own() -> None:
    BUILT.clear()
    app = client_app(build)
    for number in (0, 1):
        app(query("mine"), context(partition_id=number, data="x.jsonl"))
    assert [config["partition-id"] for _, config in BUILT] == [0, 1]


def test_an_app_that_was_pickled_for_another_process_shares_that_processes_participant() -> None:
    from ray import cloudpickle  # slow to import

    BUILT.clear()
    app = client_app(build)
    for number in (0, 1):
        copy: ClientApp = pickle.loads(cloudpickle.dumps(app))  # as Flower's simulation does for each message
        copy(query("pickled"), context(partition_id=number))
    assert len(BUILT) == 1


@pytest.mark.parametrize("config", [{}, {"partition_id": "0"}, {"partition_id": -1}, {"partition_id": True}])
def test_a_node_that_does_not_say_which_client_it_is_is_told_how_to(config: dict[str, bool | int | str]) -> None:
    reply = client_app(build)(query("who"), context(**config))
    refusal = unpack_refusal(reply.content)
    assert refusal.cause == "failed"
    assert "partition-id is" in refusal.reason
    assert "--node-config 'partition-id=0'" in refusal.reason


def test_a_message_that_no_coordinator_would_send_is_answered_with_a_refusal() -> None:
    message = query("x")
    message.content = RecordDict()
    reply = client_app(build)(message, context(partition_id=0))
    assert unpack_refusal(reply.content).cause == "refused"


def test_a_server_app_runs_main_with_its_grid_and_run_config() -> None:
    seen: list[object] = []
    app = server_app(lambda grid, config: seen.extend([grid, dict(config)]))
    grid = in_process(build, 1)
    app(grid, Context(1, 1, {}, RecordDict(), {"experiment": "x.toml"}))
    assert seen == [grid, {"experiment": "x.toml"}]


class Echo:
    """Replies to each message with its own content, and notes when it does."""

    def __init__(self) -> None:
        self.handled: list[int] = []
        self.batches: list[int] = []

    def __call__(self, messages: Sequence[Message], nodes: Mapping[int, NodeConfig]) -> Iterator[Message]:
        self.batches.append(len(messages))
        for message in messages:
            self.handled.append(message.metadata.dst_node_id)
            yield Message(message.content, reply_to=message)


def test_the_in_process_grid_hands_over_a_whole_batch_and_gives_replies_one_by_one() -> None:
    echo = Echo()
    grid = InProcessGrid(echo, [{}] * 3)
    names = grid.push_messages([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])
    assert echo.handled == []
    for i in range(3):
        (reply,) = grid.pull_messages(names)
        assert reply.metadata.reply_to_message_id == names[i]
        assert echo.handled == [1, 2, 3][: i + 1]
    assert grid.pull_messages(names) == []
    assert echo.batches == [3]


def test_the_in_process_grid_never_handles_what_nobody_asks_for_any_more() -> None:
    echo = Echo()
    grid = InProcessGrid(echo, [{}] * 3)
    old = grid.push_messages([Message(RecordDict(), node, "train") for node in (1, 2, 3)])
    grid.pull_messages(old)
    new = grid.push_messages([Message(RecordDict(), 2, "train")])
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(new)] == new
    assert grid.pull_messages(old) == []
    assert echo.handled == [1, 2]


def test_the_in_process_grid_sends_and_receives_at_once_and_skips_unknown_nodes() -> None:
    grid = InProcessGrid(Echo(), [{}] * 2)
    messages = [Message(RecordDict(), node, "train") for node in (1, 9, 2)]
    assert len(grid.send_and_receive(messages)) == 2
