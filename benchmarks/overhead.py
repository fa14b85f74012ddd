"""Share of a round that is not training: packing, checks, sums, checkpoint.  Run: python benchmarks/overhead.py"""

import tempfile
from pathlib import Path
from time import perf_counter

from measure import save, timed

from fedpeft.config import experiment
from fedpeft.flower import drive, in_process, muster
from fedpeft.report import RunFolder, settled
from fedpeft.rounds import SumRound
from fedpeft.rules import MeanRule, ServerState, Task
from fedpeft.run import participant

SETTINGS = {
    "rounds": 3,
    "model": {"name": "minilm"},
    "data": {"name": "wiki11", "examples": 800},
    "partition": {"name": "iid", "clients": 10},
    "adapter": {"rank": 8, "targets": ["query", "value"]},
    "training": {"batch": 16, "length": 32, "epochs": 1},
}


def main() -> None:
    """Three rounds of one local epoch on 64 rows a client, after one to warm up."""
    found = experiment(SETTINGS)
    assert isinstance(found.rule, MeanRule)
    working, clock = timed(participant(found.settings_json, {"partition-id": 0}))
    grid = in_process(lambda settings, config: working, 10)
    fleet = muster(grid, found.rule, found.settings_json, 10, 60.0)
    assert fleet.start is not None
    state = ServerState(Task(fleet.start.spec), fleet.start)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder.create(Path(name) / "run", "")
        for number in range(found.rounds + 1):
            clock.seconds, began = 0.0, perf_counter()
            round = SumRound(state, dict.fromkeys(range(10), 1 << 30), 10, rule=found.rule)
            traffic = drive(fleet, round, 600.0)
            state = settled(round.result().state)
            folder.checkpoints.save(state, {})
            total = perf_counter() - began
            if number:
                rows.append(
                    {
                        "round": number,
                        "seconds": total,
                        "training seconds": clock.seconds,
                        "share not training": 1 - clock.seconds / total,
                        "milliseconds a client": 1000 * (total - clock.seconds) / 10,
                        "bytes up a client": traffic.bytes_up // 10,
                        "payload": 4 * (found.rule.layout(state.task).size + 5),
                    }
                )
    save("overhead", rows)


if __name__ == "__main__":
    main()
