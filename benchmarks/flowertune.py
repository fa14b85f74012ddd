"""A round as FlowerTune runs it: Flower's simulation runtime, and a client that loads its model in every call.

One round of FedAvg over 16 clients, written with Flower's own strategy. Kinder than the example: rows are tokens
already, nothing is written to disk, and Ray's start and the actors' imports are done before the clock runs.
Run by throughput.py: python flowertune.py FOLDER ROUNDS
"""

import json
import os
import resource
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

CLIENTS, ACTORS = 16, len(os.sched_getaffinity(0))
FOLDER = Path(sys.argv[1])


def peak() -> float:
    """The largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576


def client() -> ClientApp:
    """Trains in the way of plain.py on the rows of its partition, from the arrays in the message."""
    app, folder, here = ClientApp(), str(FOLDER), str(Path(__file__).parent)

    @app.query()
    def hello(message: Message, context: Context) -> Message:
        sys.path.append(here)
        import plain

        return Message(RecordDict({"metrics": MetricRecord({"imported": len(plain.__name__)})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import plain

        work = json.loads((Path(folder) / "work.json").read_text(encoding="utf8"))
        mine = work["clients"][int(context.node_config["partition-id"])]
        began = perf_counter()
        model = plain.load(work)
        loading = perf_counter() - began
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        state, loss, _ = plain.fit(model, arrays.to_torch_state_dict(), mine, work, in_plan=True)
        facts: dict[str, Any] = {
            "num-examples": len(mine["ids"]),
            "loss": loss,
            "loading": loading,
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576,
        }
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord(facts)}), reply_to=message)

    return app


def server(rounds: int, began: float) -> ServerApp:
    """One message to each client to start with, then the rounds; prints what they took."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from safetensors.torch import load_file

        while len(nodes := list(grid.get_node_ids())) < CLIENTS:
            pass
        grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes])
        ready = perf_counter() - began
        seconds, found = [], None
        for _ in range(rounds):
            start = perf_counter()
            strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, weighted_by_key="num-examples")
            arrays = ArrayRecord(load_file(FOLDER / "start.safetensors"))
            result = strategy.start(grid, arrays, num_rounds=1)
            seconds.append(perf_counter() - start)
            found = result.train_metrics_clientapp[1]  # means over the clients
        assert found is not None
        actor = found["peak"]
        assert isinstance(actor, float)
        facts = {"start": ready, "seconds": seconds, "loss": found["loss"], "loading": found["loading"]}
        print(json.dumps(facts | {"peak MB": peak() + ACTORS * actor}), flush=True)

    return app


def main() -> None:
    """A simulation of that many rounds."""
    began = perf_counter()
    run_simulation(
        server(int(sys.argv[2]), began),
        client(),
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main()
