"""Peak memory of a round for 10, 100 and 1,000 clients, server and process.  Run: python benchmarks/memory.py"""

import resource
import subprocess
import sys
import tracemalloc

import numpy as np
from measure import save

from fedpeft.config import experiment
from fedpeft.flower import drive, in_process, muster
from fedpeft.rounds import SumRound
from fedpeft.rules import FactorMean, ServerState, Task
from fedpeft.run import participant

SIZES = (10, 100, 1000)


def settings(clients: int) -> dict[str, object]:
    """Eight rows a client, so that 1,000 clients fit the data set."""
    return {
        "rounds": 1,
        "model": {"name": "minilm"},
        "data": {"name": "wiki11", "examples": 8 * clients},
        "split": {"central": 0.0, "validation": 0.0, "test": 0.0},
        "evaluation": {"central": False},
        "partition": {"name": "iid", "clients": clients},
        "adapter": {"rank": 8, "targets": ["query", "value"]},
        "training": {"batch": 8, "length": 16},
    }


def one_round(clients: int) -> None:
    """A whole round in this process; prints its peak resident memory in bytes, with the base loaded and at the end."""
    found = experiment(settings(clients))
    working = participant(found.settings_json, {"partition-id": 0})
    start = working.trainer.start()
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fleet = muster(in_process(lambda s, c: working, clients), found.rule, found.settings_json, clients, 600.0)
    round = SumRound(
        ServerState(Task(start.spec), start), dict.fromkeys(range(clients), 1 << 30), clients, rule=FactorMean()
    )
    drive(fleet, round, 3600.0)
    assert len(round.result().survivors) == clients
    print(loaded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def server(clients: int) -> int:
    """Peak bytes that the server's half of a round takes: terms come one by one, as from a network."""
    found = experiment(settings(10))
    start = participant(found.settings_json, {"partition-id": 0}).trainer.start()
    state = ServerState(Task(start.spec), start)
    size = FactorMean().layout(state.task).size
    tracemalloc.start()
    round = SumRound(state, dict.fromkeys(range(clients), 1 << 30), clients, rule=FactorMean())
    for client in range(clients):
        term = np.full(size + 5, 0.01, np.float32)
        term[size] = 1.0
        round.receive(client, term, 0, 0)
    round.close()
    round.result()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Each size in a process of its own, since a peak never falls."""
    rows = []
    for clients in SIZES:
        out = subprocess.run(
            [sys.executable, __file__, str(clients)], capture_output=True, text=True, check=True
        ).stdout.split()
        rows.append(
            {
                "clients": clients,
                "server MB": server(clients) / 1e6,
                "process MB, base loaded": int(out[-2]) / 1e6,
                "process MB, after the round": int(out[-1]) / 1e6,
            }
        )
    save("memory", rows)


if __name__ == "__main__":
    one_round(int(sys.argv[1])) if len(sys.argv) > 1 else main()
