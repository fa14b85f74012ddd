"""How long a server takes for a round of unequal ranks, and in how much memory.  Run: python benchmarks/aggregation.py

Each rule in a process of its own, that has nothing of torch in it: 32 layers of 4096 x 4096, server's rank 64, 100
clients of ranks 4, 8, 16, 32 and 64. Answers are made one after another, as from a network, and not timed; timed is
what the server does with them. Beside it, one layer's dense way: the mean of the products, and its SVD.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from time import perf_counter, process_time

import numpy as np
from measure import save

from fedpeft.adapters import Adapter, Array, LowRank
from fedpeft.channel import PlainChannel
from fedpeft.rounds import ListRound, Metrics, Round, SumRound
from fedpeft.rules import FlexLoRA, FLoRA, ListRule, MeanRule, ServerState, Subspace, Task, ZeroPad

LAYERS, SIDE, RANK, CLIENTS, RANKS = 32, 4096, 64, 100, (4, 8, 16, 32, 64)
RULES = {
    "subspace": Subspace(seed=1),
    "subspace, one pass": Subspace(seed=1, one_pass=True),
    "flexlora": FlexLoRA(),
    "zeropad": ZeroPad(),
    "flora, tail of 256": FLoRA(seed=1, largest=256),
}
DENSE = 1024
"""The side of the dense SVD that is timed; its cost grows with the third power."""


def start() -> ServerState:
    """A server's state with an adapter that has been trained for a while."""
    rng = np.random.default_rng(0)
    layers = {
        f"layer{i}": LowRank(
            rng.normal(size=(RANK, SIDE)).astype(np.float32) / np.float32(SIDE**0.5),
            rng.normal(size=(SIDE, RANK)).astype(np.float32) / 100,
            2.0,
        )
        for i in range(LAYERS)
    }
    adapter = Adapter(layers)
    return ServerState(Task(adapter.spec), adapter)


def answer(machine: Round, rule: MeanRule | ListRule, rank: int, rng: np.random.Generator) -> Array:
    """An answer as a client of this rank would send it: noise where it has something to say, zeros elsewhere."""
    parts = []
    for name, shape in rule.layout(machine.state.task).shapes:
        x = rng.standard_normal(shape, np.float32) / np.float32(100)
        if name.endswith("/a"):
            x[rank:] = 0
        elif name.endswith("/b"):
            x[:, rank:] = 0
        elif name.endswith("/lacks"):
            x = (np.arange(shape[0]) >= rank).astype(np.float32)
        parts.append(x.ravel())
    whole = Metrics(1.0, 1.0, 1.0, 1.0).vector()
    return np.concatenate([*parts, [rng.uniform(1, 9)], whole]).astype(np.float32)


def rounds(name: str) -> Iterator[dict[str, object]]:
    """One round of a rule, timed."""
    rule, rng = RULES[name], np.random.default_rng(1)
    ranks = {client: RANKS[client % len(RANKS)] for client in range(CLIENTS)}
    state = start()
    channel = PlainChannel(largest_norm=1e9)
    machine: Round
    if isinstance(rule, ListRule):
        machine = ListRound(state, ranks, 1, channel, rule=rule)
    else:
        machine = SumRound(state, ranks, 1, channel, rule=rule)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = busy = 0.0
    while not machine.is_over:
        task = machine.state.task
        for client, rank in ranks.items():
            term = answer(machine, rule, rank, rng)
            at, worked = perf_counter(), process_time()
            machine.receive(client, term, task.round, task.pass_)
            seconds, busy = seconds + perf_counter() - at, busy + process_time() - worked
        del term
        at, worked = perf_counter(), process_time()
        machine.close()
        seconds, busy = seconds + perf_counter() - at, busy + process_time() - worked
    received = seconds
    at, worked = perf_counter(), process_time()
    after = machine.result().state
    seconds, busy = seconds + perf_counter() - at, busy + process_time() - worked
    assert after.adapter.layers["layer0"].rank == RANK
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    yield {
        "rule": name,
        "seconds": seconds,
        "of it receiving": received,
        "processor seconds": busy,
        "peak MB": peak,
        "before the round MB": began,
    }


def dense() -> dict[str, object]:
    """The dense way, from one smaller layer: products of all clients added up, and a full SVD."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(RANK, SIDE)), rng.normal(size=(SIDE, RANK))
    at = perf_counter()
    b @ a
    product = perf_counter() - at
    x = rng.normal(size=(DENSE, DENSE))
    at = perf_counter()
    np.linalg.svd(x)
    svd = (perf_counter() - at) * (SIDE / DENSE) ** 3
    return {
        "rule": f"dense SVD, projected from {DENSE} x {DENSE}",
        "seconds": LAYERS * (product * sum(RANKS) / len(RANKS) / RANK * CLIENTS + svd),
        "peak MB": 3 * SIDE * SIDE * 8 / 2**20,
    }


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--one":
        print(json.dumps(next(rounds(sys.argv[2]))))
        return
    names = sys.argv[1:] or list(RULES)
    rows = []
    for name in names:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    rows.append(dense())
    if len(sys.argv) == 1:
        save("aggregation", rows)


if __name__ == "__main__":
    main()
