"""The loop and the cohort engine in a process of their own.  Run by throughput.py: python engines.py CASE WAY."""

import json
import resource
import sys
from collections.abc import Sequence
from time import perf_counter, process_time
from typing import Any

from measure import HERE  # noqa: F401  # the process's settings, before torch
from work import CASES, alone, jobs, trainer

from fedpeft.rounds import Done, Job
from fedpeft.training.loop import TorchTrainer

TOP = 14


def run(engine: TorchTrainer, todo: Sequence[Job]) -> dict[str, Any]:
    """All jobs once: seconds, each client's sum of losses, and (rows, length) of every pass."""
    passes: list[tuple[int, int]] = []
    words: Any = engine.frozen.model.get_input_embeddings()
    hook = words.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    began, spent = perf_counter(), process_time()
    done = list(engine.train_many(todo))
    seconds, cpu = perf_counter() - began, process_time() - spent
    hook.remove()
    found = [x for x in done if isinstance(x, Done)]
    assert len(found) == len(todo), done
    losses = [x.metrics.loss for x in found]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576
    return {"seconds": seconds, "cpu seconds": cpu, "losses": losses, "passes": passes, "peak MB": peak}


def profiled(engine: TorchTrainer, todo: Sequence[Job]) -> list[dict[str, Any]]:
    """Where torch's time goes in one run: by operation, the largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        list(engine.train_many(todo))
    events = sorted(seen.key_averages(), key=lambda x: -x.self_cpu_time_total)
    whole = sum(x.self_cpu_time_total for x in events)
    return [
        {
            "operation": x.key,
            "share": x.self_cpu_time_total / whole,
            "calls": x.count,
            "milliseconds": x.self_cpu_time_total / 1000,
        }
        for x in events[:TOP]
    ]


def rates(reference: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """The best rate of matrix products of these sizes (m, k, n), GFLOP/s, by type of number."""
    import torch

    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        best = 0.0
        for m, k, n in reference:
            x, w = torch.ones(m, k, dtype=kind), torch.ones(n, k, dtype=kind)
            for _ in range(6):
                began = perf_counter()
                torch.nn.functional.linear(x, w)
                best = max(best, 2 * m * k * n / (perf_counter() - began) / 1e9)
        found[name] = best
    return found


def main() -> None:
    """One line of output for each line of input: "plan" or "random", which are the same here, and how many clients;
    "profile"; or "roof"."""
    case, way = CASES[sys.argv[1]], sys.argv[2]
    whole = trainer(case, "bf16" if way.endswith("bf16") else "fp32")
    engine: TorchTrainer = alone(whole) if way == "loop" else whole
    todo = jobs(whole)
    refusal = whole.refusal
    assert not refusal, refusal
    config = whole.frozen.model.config
    facts = {"ready": True, "attention": config._attn_implementation, "group": whole.room()}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        match line.split():
            case ["profile"]:
                print(json.dumps(profiled(engine, todo)), flush=True)
            case ["roof"]:
                print(json.dumps(rates([(1024, 1024, 1024), (2048, 2048, 2048), (4096, 384, 1536)])), flush=True)
            case [_, clients]:
                print(json.dumps(run(engine, todo[: int(clients)])), flush=True)


if __name__ == "__main__":
    main()
