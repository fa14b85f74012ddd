"""Simulated runs in virtual time: the records, the schedule foretold, the replay, and the resumption."""

import json
from itertools import pairwise

import pytest

from fedpeft.config import experiment
from fedpeft.errors import ConfigError, DataError
from fedpeft.report import RunFolder, history
from fedpeft.rounds import answer_size
from fedpeft.run import Lines, simulate
from fedpeft.run.outlook import outlook
from fedpeft.run.virtual import Work, population, read_trace
from fedpeft.run.workshop import workshop

KINDS = {
    "slow": {"tokens_per_second": 5.0, "share": 2, "jitter": 0.3},
    "fast": {"tokens_per_second": 40.0, "share": 1},
    "small": {"tokens_per_second": 40.0, "share": 1, "memory": "1MB"},
}


def settings(tmp_path, **changes):
    rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]}" for i in range(96)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    base = {
        "rounds": 4,
        "seed": 4,
        "model": {"name": "tiny-bert"},
        "data": {"name": str(tmp_path / "own.csv")},
        "partition": {"name": "iid", "clients": 8},
        "training": {"length": 8, "threads": 1},
        "selection": {"count": 4, "deadline": 60.0, "quorum": 0.25},
        "evaluation": {"clients": False},
        "baselines": {"base": False},
        "simulation": {"engine": "loop", "devices": {k: dict(v) for k, v in KINDS.items()}},
    }
    return base | changes


BUFFERED = {"schedule": {"name": "buffered", "buffer": 2, "concurrency": 5}}


def untimed(path):
    drop = {"processes", "seconds", "seconds_training", "started", "command", "settings", "bytes_up", "bytes_down"}
    records = [json.loads(x) for x in (path / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    return [{k: v for k, v in record.items() if k not in drop} for record in records]


def run(tmp_path, name, **changes):
    simulate(experiment(settings(tmp_path, **changes)), tmp_path / name, Lines())
    return history(tmp_path / name)


def test_a_synchronous_run_has_a_deadline_in_simulated_seconds(tmp_path):
    steady = {k: v | {"jitter": 0.0} for k, v in KINDS.items()}
    simulation = {"engine": "loop", "devices": steady}
    found = settings(tmp_path, selection={"count": 8, "deadline": 10.0, "quorum": 0.1}, simulation=simulation)
    simulate(experiment(found), tmp_path / "run", Lines())
    h = history(tmp_path / "run")
    kinds = {c: x.device for c, x in h.run.clients.items()}
    assert sorted(kinds.values()) == ["fast"] * 2 + ["slow"] * 4 + ["small"] * 2
    for number, x in enumerate(h.rounds, start=1):
        assert {kinds[c] for c in x.survivors} == {"fast"}
        assert x.simulated == 10.0 * number
        reasons = {kinds[c]: why for c, why in x.refused}
        assert reasons["slow"] == "no answer before the deadline"
        assert reasons["small"].startswith("out of memory: training takes about")
        assert reasons["small"].endswith("a small has 0.001 GB (simulation.devices.small.memory)")
        assert {v.fate for v in x.visits if kinds[v.client] == "slow"} <= {"late", "away"}
        assert x.timeline == ()
    assert "Devices at work" in (tmp_path / "run" / "report.html").read_text(encoding="utf8")


@pytest.mark.parametrize("schedule", [{}, BUFFERED])
def test_the_same_seed_gives_the_same_timeline_and_adapter_bit_for_bit(tmp_path, schedule):
    first, again = run(tmp_path, "first", **schedule), run(tmp_path, "again", **schedule)
    assert untimed(first.path) == untimed(again.path)
    assert [x.visits for x in first.rounds] == [x.visits for x in again.rounds]
    assert first.final.adapter_digest == again.final.adapter_digest
    times = [x.simulated for x in first.rounds]
    assert times == sorted(set(times))
    other = run(tmp_path, "other", **schedule, seed=5)
    assert [x.visits for x in other.rounds] != [x.visits for x in first.rounds]


class StopHereError(Exception):
    pass


class Impatient(Lines):
    """Stops in the middle of a round, or right after one."""

    def __init__(self, after, within):
        self.after, self.within, self.done, self.answers = after, within, 0, 0

    def round(self, record, rounds):
        self.done += 1
        if self.done == self.after and not self.within:
            raise StopHereError

    def advance(self):
        self.answers += self.done >= self.after
        if self.within and self.answers == 2:
            raise StopHereError


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("schedule", [{}, BUFFERED], ids=["synchronous", "buffered"])
def test_a_run_that_was_cut_off_goes_on_with_the_same_schedule_and_ends_in_the_same_adapter(tmp_path, schedule, within):
    whole = run(tmp_path, "whole", **schedule)
    found = experiment(settings(tmp_path, **schedule))
    with pytest.raises(StopHereError):
        simulate(found, tmp_path / "broken", Impatient(2, within))
    simulate(found, tmp_path / "broken", Lines())
    assert untimed(tmp_path / "broken") == untimed(whole.path)
    mine, other = (RunFolder.open(x).checkpoints.files()[-1] for x in (tmp_path / "broken", whole.path))
    assert mine.read_bytes() == other.read_bytes()
    if schedule:
        assert any(age > 0 for x in whole.rounds for age in x.staleness)


@pytest.mark.parametrize("schedule", [{}, BUFFERED], ids=["synchronous", "buffered"])
@pytest.mark.parametrize("over", [0.0, 0.5])
def test_the_schedule_that_is_foretold_is_the_one_that_comes(tmp_path, schedule, over):
    kinds = {k: v | {"jitter": 0.0} for k, v in KINDS.items()}  # jitter differs from round to round
    found = experiment(
        settings(
            tmp_path,
            rounds=20,
            selection={"count": 4, "over": over, "deadline": 60.0, "quorum": 0.1},
            evaluation={"every": 20, "clients": False},
            simulation={"engine": "loop", "devices": kinds},
            **schedule,
        )
    )
    simulate(found, tmp_path / "run", Lines())
    times = [0.0, *(x.simulated for x in history(tmp_path / "run").rounds)]
    steps = sorted(b - a for a, b in pairwise(times))
    here = workshop(found.settings_json)
    spec = here.trainer.start().spec
    down = 4 * sum(x.d * x.rank + x.rank * x.k for x in spec.layers) + 4 * sum(x[1][0] * x[1][-1] for x in spec.dense)
    ahead = outlook(found, here, lambda rank: down)
    # The bytes of the head are counted roughly above, which is far less than a second.
    assert ahead.round_seconds == pytest.approx((steps[9] + steps[10]) / 2, abs=0.05)
    assert {(x.name, x.clients, bool(x.problem)) for x in ahead.paces} == {
        ("slow", 4, False),
        ("fast", 2, False),
        ("small", 2, True),
    }


def test_what_a_client_has_to_do_is_known_before_it_is_done(tmp_path):
    found = experiment(settings(tmp_path))
    here = workshop(found.settings_json)
    people, work = population(found, here), Work(found, here)
    errand = work.errand(people, 3, 0, 0)
    rows = here.trainer.rows(3, "train")
    assert errand.tokens == pytest.approx(sum(int(x) for x in rows.lengths))
    assert errand.up == 4 * answer_size(found.rule, _task(here), True)
    assert work.errand(people, 3, 0, 1).tokens == 0.0


def _task(here):
    from fedpeft.rules import Task

    return Task(here.trainer.start().spec)


def test_a_buffered_simulation_without_devices_is_refused_with_the_way_out(tmp_path):
    found = experiment(settings(tmp_path, simulation={"engine": "loop"}, **BUFFERED))
    with pytest.raises(ConfigError, match=r"schedule\.name: .*want \[simulation\.devices"):
        simulate(found, tmp_path / "run", Lines())
    assert not (tmp_path / "run").exists()


def test_a_buffer_of_more_than_all_clients_is_refused(tmp_path):
    found = experiment(settings(tmp_path, schedule={"name": "buffered", "buffer": 9}))
    with pytest.raises(ConfigError, match=r"schedule\.buffer: got 9; want at most the number of clients, 8"):
        simulate(found, tmp_path / "run", Lines())


def test_a_trace_is_read_device_by_device(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("device,from,to\nb,5,9\na,0,10\na,20,30\n", encoding="utf8")
    first, second = read_trace(file)
    assert (first.window(12), second.window(0)) == ((20, 30), (5, 9))
    file.write_text("from,to\n1,2\n", encoding="utf8")
    assert read_trace(file)[0].window(0) == (1, 2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("from,to\n", "has no windows"),
        ("from,to\n1,2\n3,x\n", "line 3"),
        ("start,end\n1,2\n", "line 2: 'from'; want numbers under from and to"),
        ("from,to\n1,3\n2,4\n", "overlap"),
    ],
)
def test_a_trace_that_can_not_be_read_names_its_file(tmp_path, text, why):
    (tmp_path / "trace.csv").write_text(text, encoding="utf8")
    with pytest.raises(DataError, match=r"trace\.csv: .*" + why):
        read_trace(tmp_path / "trace.csv")
    with pytest.raises(DataError, match=r"none\.csv: can't be read"):
        read_trace(tmp_path / "none.csv")


def test_a_run_follows_the_trace_of_its_devices(tmp_path):
    (tmp_path / "trace.csv").write_text("from,to\n100,2000\n", encoding="utf8")
    kind = {"tokens_per_second": 50.0, "trace": str(tmp_path / "trace.csv")}
    h = run(
        tmp_path,
        "run",
        rounds=1,
        selection={"count": 2, "deadline": 600.0},
        simulation={"engine": "loop", "devices": {"mine": kind}},
    )
    (only,) = h.rounds
    assert [v.began for v in only.visits] == [100.0, 100.0]
    assert 100 < only.simulated < 110
