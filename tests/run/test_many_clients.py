"""Very many clients: memory does not grow with them, evaluation and reports are of a sample, rounds are counted."""

import tracemalloc
from dataclasses import replace

import pytest

from fedpeft.adapters import same
from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import Registry, in_process
from fedpeft.report import FLEET, RunFolder, history, write_report
from fedpeft.run import Lines, simulate
from fedpeft.run.coordinate import Coordinator
from fedpeft.run.panel import panel
from tests.flower.linear import LinearTrainer, participant

MANY = 1_000_000


def made(clients, **sections):
    settings = {
        "rounds": 3,
        "data": {"name": "none"},
        "partition": {"name": "sampled", "clients": clients},
        "selection": {"count": 20, "deadline": 1e9},
        "evaluation": {"sample": 15, "exactness": False},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values if isinstance(values, dict) else values
    return experiment(settings)


class Heard(Lines):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def round(self, record, rounds):
        pass


def coordinated(folder, clients, view=None, **sections):
    """A run of the linear model, without torch."""
    run = RunFolder.create(folder, "") if not folder.exists() else RunFolder.open(folder)
    grid = in_process(lambda settings, config: participant(LinearTrainer()), clients)
    Coordinator(made(clients, **sections), run, view or Heard()).run(grid, clients)
    return history(folder)


def test_a_run_of_a_million_clients_takes_no_more_memory_and_writes_no_more_than_one_of_a_hundred(tmp_path):
    def peak(clients, name):
        tracemalloc.start()
        coordinated(tmp_path / name, clients)
        got = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return got

    peak(100, "first")  # what is made at the first use
    few, many = peak(100, "few"), peak(MANY, "many")
    assert abs(many - few) < 100_000  # bytes; one pointer a client would be 8 MB
    sizes = [sum(x.stat().st_size for x in (tmp_path / name).rglob("*") if x.is_file()) for name in ("few", "many")]
    assert abs(sizes[1] - sizes[0]) < 10_000  # a client's number has more digits


def test_each_round_is_in_the_ledger_and_once_even_if_it_was_done_over(tmp_path):
    whole = coordinated(tmp_path / "run", 100)
    registry = Registry(tmp_path / "run" / FLEET)
    for client in range(100):
        asked = [x for x in whole.rounds if client in x.asked]
        got = registry.ledger(client)
        assert (got.asked, got.answered, got.refused) == (len(asked), len(asked), 0)
        assert got.last_round == (asked[-1].round - 1 if asked else None)
        assert (got.bytes_up > 0) == bool(asked)
    assert sum(registry.ledger(c).bytes_down for c in range(100)) == whole.bytes_down
    registry.record(3, [5], [5], [], {})  # of a process that was killed before its checkpoint
    coordinated(tmp_path / "run", 100, rounds=5)
    asked = [x.round - 1 for x in history(tmp_path / "run").rounds if 5 in x.asked]
    later = Registry(tmp_path / "run" / FLEET)
    assert later.ledger(5).asked == len(asked)
    assert later.ledger(5).last_round == max(asked, default=None)


def test_clients_that_have_taken_part_rest(tmp_path):
    rounds = coordinated(tmp_path / "run", 100, selection={"rest": 2}, rounds=6).rounds
    for i, x in enumerate(rounds):
        for earlier in rounds[max(0, i - 2) : i]:
            assert not set(x.asked) & set(earlier.asked)
        assert len(x.asked) == 20
    assert set(rounds[3].asked) & set(rounds[0].asked)  # 20 of 60 are drawn; a third of them were in round 1


def test_a_run_that_goes_on_lets_the_same_clients_rest(tmp_path):
    whole = coordinated(tmp_path / "whole", 100, selection={"rest": 2}, rounds=4)
    coordinated(tmp_path / "broken", 100, selection={"rest": 2}, rounds=2)
    again = coordinated(tmp_path / "broken", 100, selection={"rest": 2}, rounds=4)
    assert [x.asked for x in again.rounds] == [x.asked for x in whole.rounds]
    assert again.final.adapter_digest == whole.final.adapter_digest


def test_resting_is_refused_where_rounds_are_buffered():
    with pytest.raises(ConfigError, match=r"selection\.rest: got 2; want 0 with schedule\.name = 'buffered'"):
        made(100, selection={"rest": 2}, schedule={"name": "buffered"}, simulation={"devices": {"phone": {}}})


def test_of_many_clients_a_sample_is_evaluated_anew_each_round_and_one_for_all_at_the_end(tmp_path):
    found = coordinated(tmp_path / "run", 100)
    seen = [tuple(x.validation.clients) for x in found.rounds]
    assert all(len(x) == 15 and x == tuple(sorted(x)) for x in seen)
    assert len(set(seen)) == 3
    assert tuple(found.final.test.clients) == tuple(c for c in panel(made(100), range(100)) if c != 1)  # it has no test
    assert found.final.central.examples == found.rounds[0].central.examples > 0


def test_few_clients_are_all_evaluated_and_a_sample_is_drawn_by_the_seed():
    found = made(100)
    assert panel(found, range(15)) == panel(found, range(15), 3) == tuple(range(15))
    draws = {panel(found, range(16)), *(panel(found, range(16), round) for round in range(3))}
    assert len(draws) > 1
    assert {len(x) for x in draws} == {15}
    assert panel(found, range(MANY)) == panel(found, range(MANY)) != panel(replace(found, seed=1), range(MANY))


def test_a_report_of_very_many_clients_is_of_a_sample_and_says_how_many_there_are(tmp_path):
    rows = [f"{'apple pear' if i % 2 else 'hammer saw'} number {i},{'ab'[i % 2]}" for i in range(200)]
    (tmp_path / "own.csv").write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf8")
    found = experiment(
        {
            "rounds": 1,
            "model": {"name": "tiny-bert"},
            "data": {"name": str(tmp_path / "own.csv")},
            "partition": {"name": "sampled", "clients": MANY, "size": 6, "largest": 9, "alpha": 1.0},
            "training": {"length": 8, "threads": 1},
            "selection": {"count": 2},
            "evaluation": {"sample": 12},
            "baselines": {"base": True, "local": True, "central": True},
        }
    )
    view = Heard()
    run = simulate(found, tmp_path / "run", view)
    h = history(run)
    assert (h.run.population, len(h.run.clients), h.run.labels) == (MANY, 12, ("a", "b"))
    assert tuple(h.run.clients) == panel(experiment(h.run.settings), range(MANY))
    assert all(set(x.clients) <= set(h.run.clients) for x in h.baselines.values())
    assert sorted(h.baselines) == ["base", "central-training", "local"]
    assert "baselines are of 12 clients, a sample of the 1,000,000 (evaluation.sample)" in view.notes
    html = write_report(run).read_text(encoding="utf8")
    assert "split over 1,000,000 clients (sampled, α = 1.0)" in html
    assert "Training rows of a client, of 12 of the 1,000,000 clients" in html
    assert len(html) < 400_000
    assert max(len(line) for line in h.path.joinpath("metrics.jsonl").read_text().splitlines()) < 10_000


def test_the_adapter_of_a_run_does_not_depend_on_whether_its_clients_were_asked_one_by_one(tmp_path):
    """Alike nodes are known from one; those that aren't are each asked: the run is the same."""
    one = coordinated(tmp_path / "alike", 30)
    grid = in_process(lambda settings, config: participant(LinearTrainer()), 30)
    apart = type(grid)(grid._handler, [dict(grid._nodes[node]) for node in range(1, 31)])
    run = RunFolder.create(tmp_path / "apart", "")
    start = Coordinator(made(30), run, Heard()).run(apart, 30)
    assert same(start, participant().trainer.start())
    assert history(tmp_path / "apart").final.adapter_digest == one.final.adapter_digest
    left, right = (Registry(tmp_path / name / FLEET) for name in ("alike", "apart"))
    assert [left.ledger(c) for c in range(30)] == [right.ledger(c) for c in range(30)]
