"""Runs whose clients differ in rank: who has which, in training, evaluation, baselines and the report."""

import csv

import pytest
import tomli_w

import fedpeft.run.coordinate as coordinate
from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import Footprints, InProcessGrid, answer
from fedpeft.report import history
from fedpeft.run import Lines, forecast, participant, serve_run, simulate
from fedpeft.run.needs import Needs
from fedpeft.run.virtual import assigned
from fedpeft.run.workshop import workshop

LEVELS = {"name": "levels", "levels": [2, 4, 8], "shares": [1, 1, 2]}
CLIENTS = 8


def settings(folder, ranks, **changes):
    """Eight clients, of whom each has a rank in its rows: 3 for the first four, 5 for the others."""
    with (folder / "own.csv").open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "client", "rank"])
        for i in range(96):
            text = f"{'apple pear' if i % 2 else 'hammer saw'} number {i}"
            writer.writerow([text, "ab"[i % 2], i // 12, 3 if i < 48 else 5])
    base = {
        "rounds": 2,
        "seed": 4,
        "model": {"name": "tiny-bert"},
        "data": {"name": str(folder / "own.csv")},
        "partition": {"name": "natural", "clients": CLIENTS, "least": 2},
        "adapter": {"rank": 8},
        "training": {"length": 8, "threads": 1},
        "baselines": {"base": False},
        "ranks": ranks,
    }
    return base | changes


@pytest.fixture
def asked(monkeypatch):
    """What clients are asked with: (what, round, rank by client)."""
    calls = []
    drive, evaluate = coordinate.drive, coordinate.evaluate

    def driving(fleet, round, *rest):
        calls.append(("train", round.state.task.round, dict(round.ranks)))
        return drive(fleet, round, *rest)

    def evaluating(fleet, state, ranks, *rest):
        calls.append(("evaluate", state.task.round, dict(ranks)))
        return evaluate(fleet, state, ranks, *rest)

    monkeypatch.setattr(coordinate, "drive", driving)
    monkeypatch.setattr(coordinate, "evaluate", evaluating)
    return calls


def test_each_client_trains_and_is_evaluated_at_its_own_rank_all_through_the_run(tmp_path, asked):
    found = experiment(settings(tmp_path, LEVELS, baselines={"base": False, "local": True}))
    simulate(found, tmp_path / "run", Lines())
    ranks = {c: found.ranks.of(c, CLIENTS, found.seed, 0) for c in range(CLIENTS)}
    assert sorted(ranks.values()) == [2, 2, 4, 4, 8, 8, 8, 8]
    assert [(what, round, x) for what, round, x in asked] == [
        ("train", 0, ranks),
        ("evaluate", 1, ranks),
        ("train", 1, ranks),
        ("evaluate", 2, ranks),
        ("evaluate", 2, ranks),
    ]
    h = history(tmp_path / "run")
    assert h.rounds[0].survivors == tuple(range(CLIENTS))
    assert {c: x.rank for c, x in h.run.clients.items()} == ranks
    assert sorted(h.baselines["local"].clients) == list(range(CLIENTS))


def test_ranks_that_are_drawn_anew_are_evaluated_at_the_round_that_is_over(tmp_path, asked):
    found = experiment(settings(tmp_path, LEVELS | {"redraw": True}))
    simulate(found, tmp_path / "run", Lines())
    first, second = ({c: found.ranks.of(c, CLIENTS, found.seed, r) for c in range(CLIENTS)} for r in (0, 1))
    assert first != second
    assert [x for _, _, x in asked] == [first, first, second, second, second]
    assert {x.rank for x in history(tmp_path / "run").run.clients.values()} == {None}


def test_a_column_says_each_clients_rank(tmp_path, asked):
    found = experiment(settings(tmp_path, {"name": "column"}, rounds=1))
    simulate(found, tmp_path / "run", Lines())
    assert asked[0] == ("train", 0, {c: 3 if c < 4 else 5 for c in range(CLIENTS)})
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf8")
    assert "Clients by rank" in report
    assert '<th scope="row" class="n">3</th><td class="n">4</td>' in report
    assert '<th scope="row" class="n">5</th><td class="n">4</td>' in report


@pytest.mark.parametrize(
    ("ranks", "changes", "reason"),
    [
        ({"name": "column", "column": "size"}, {}, "ranks.column: no column 'size' in .*own.csv; it has text, label,"),
        ({"name": "column"}, {"adapter": {"rank": 4}}, "ranks.column: 'rank' has a rank of 5; the server's is 4"),
        (
            {"name": "column"},
            {"partition": {"name": "iid", "clients": 3}},
            "ranks.column: the rows of client 0 have 2 ranks, 3, 5; want one a client",
        ),
        ({"name": "column"}, {"data": {"name": "wiki11"}}, "ranks.name: got 'column', and data.name 'wiki11' is a"),
        ({"name": "listed", "by_client": [2, 4]}, {}, "ranks.by_client: has no rank for client 2, and names 2 of 8"),
        ({"name": "memory", "levels": [2, 4]}, {}, "ranks.name: got 'memory' in a simulation where no device has any"),
        (
            LEVELS | {"redraw": True},
            {"rule": {"name": "fedsa"}},
            "ranks.redraw: got true, and clients keep .*/b and 3 more at the rank that they had",
        ),
        (
            LEVELS | {"redraw": True},
            {"personal": {"tensors": ["*/a"]}},
            "ranks.redraw: got true, and clients keep .*/a and 3 more at the rank that they had",
        ),
        (
            {"name": "whole"},
            {"rule": {"name": "krum", "share": 0.4}},
            r"rule.share: got 0.4, which is 3 of a round's 8 clients, and krum wants more than 8 then; want a smaller",
        ),
        (
            {"name": "whole"},
            {"rule": {"name": "multi_krum", "share": 0.25}, "selection": {"count": 4}},
            r"rule.share: got 0.25, which is 1 of a round's 4 clients, and multi_krum wants more than 4 then",
        ),
        (
            LEVELS,
            {"rule": {"name": "median"}, "personal": {"tensors": ["classifier*"]}},
            "rule.name: median never moves a direction that at most 50% of the clients hold, and 50% have the server's "
            "rank of 8; want adapter.rank = 4, which enough of them have",
        ),
        (
            {"name": "levels", "levels": [2, 4, 8], "shares": [1, 6, 1]},
            {"rule": {"name": "trimmed_mean", "share": 0.2}},
            "rule.name: trimmed_mean never moves a direction that at most 20% of the clients hold, and 12% have the "
            "server's rank of 8; want adapter.rank = 4, which enough",
        ),
    ],
)
def test_what_can_not_be_run_is_refused_by_check_and_by_run_alike(tmp_path, ranks, changes, reason):
    found = experiment(settings(tmp_path, ranks, **changes))
    with pytest.raises(ConfigError, match=f"^{reason}"):
        forecast(found)
    with pytest.raises(ConfigError, match=f"^{reason}"):
        simulate(found, tmp_path / "run", Lines())


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        ({"name": "whole"}, {"rule": {"name": "krum", "share": 0.26}, "selection": {"count": 8}}),
        ({"name": "whole"}, {"rule": {"name": "krum", "share": 0.2}, "selection": {"count": 4}}),
        ({"name": "levels", "levels": [4, 8], "shares": [3, 5]}, {"rule": {"name": "median"}}),
        ({"name": "levels", "levels": [4, 8], "shares": [5, 3]}, {"rule": {"name": "trimmed_mean", "share": 0.3}}),
        (LEVELS | {"redraw": True}, {"personal": {"tensors": ["classifier*"]}}),
        (LEVELS, {"rule": {"name": "fedsa"}}),
        (LEVELS, {"rule": {"name": "fedex"}}),
    ],
)
def test_what_just_can_be_run_is_not_refused(tmp_path, ranks, changes):
    forecast(experiment(settings(tmp_path, ranks, **changes)))


def test_a_forecast_tells_how_many_have_which_rank_and_what_they_fetch(tmp_path):
    ahead = forecast(experiment(settings(tmp_path, LEVELS | {"redraw": False}, rule={"name": "zeropad"})))
    assert (ahead.ranks, ahead.told) == (((2, 2), (4, 2), (8, 4)), CLIENTS)
    whole = forecast(experiment(settings(tmp_path, {"name": "whole"}, rule={"name": "zeropad"})))
    assert (whole.ranks, whole.bytes_up) == ((), ahead.bytes_up)
    start = workshop(experiment(settings(tmp_path, {"name": "whole"})).settings_json).trainer.start()
    sizes = {r: sum(x.nbytes for x in start.cut(r).tensors().values()) for r in (2, 4, 8)}
    assert whole.bytes_down == sizes[8]
    assert ahead.bytes_down == (2 * sizes[2] + 2 * sizes[4] + 4 * sizes[8]) // 8
    frozen = forecast(experiment(settings(tmp_path, LEVELS)))
    assert frozen.bytes_down == sizes[8]  # what a client does not train it runs


DEVICES = {"small": {"tokens_per_second": 40.0}, "large": {"tokens_per_second": 40.0}, "none": {"gflops": 1.0}}


def test_a_simulated_devices_memory_gives_the_rank_and_may_not_suffice_for_the_smallest(tmp_path, asked):
    found = experiment(settings(tmp_path, {"name": "whole"}))
    needs = Needs(workshop(found.settings_json).trainer)
    assert needs.of(9, 2) < needs.of(9, 4) < needs.of(9, 8) == needs.of(9, 100)
    assert needs.of(9, 2) < needs.of(12, 2) < needs.of(16, 2) == needs.of(99, 2)
    assert [needs.fitting((4, 2, 8), 9, needs.of(9, r) + more) for r, more in ((8, 0), (8, -1), (4, 0), (2, -1))] == [
        *(8, 4, 4, 2)
    ]
    # Of its 12 rows a client trains on about 10.
    most = {"small": needs.of(99, 4) + 1.0, "large": needs.of(99, 8) + 1.0, "none": needs.of(1, 2) / 2}
    devices = {kind: x | {"memory": most[kind]} for kind, x in DEVICES.items()}
    ranks = {"name": "memory", "levels": [2, 4, 8]}
    changes = {"rounds": 1, "selection": {"deadline": 1e6, "quorum": 0.1}}
    found = experiment(settings(tmp_path, ranks, simulation={"engine": "loop", "devices": devices}, **changes))
    here = workshop(found.settings_json)
    rank = assigned(found, here)
    simulate(found, tmp_path / "run", Lines())
    h = history(tmp_path / "run")
    kinds = {c: x.device for c, x in h.run.clients.items()}
    for c, kind in kinds.items():
        fits = {"small": max(r for r in (2, 4, 8) if Needs(here.trainer).of(here.counts(c).train, r) <= most["small"])}
        want = (fits | {"large": 8, "none": 2})[kind]
        assert (rank(c, 0), asked[0][2][c], h.run.clients[c].rank) == (want, want, want)
    assert {c for c, why in h.rounds[0].refused if "out of memory" in why} == {
        c for c, k in kinds.items() if k == "none"
    }
    assert len(h.rounds[0].survivors) == sum(kind != "none" for kind in kinds.values())
    told = {c: (x.rank, x.budget) for x in h.memory.devices for c in x.clients}
    assert told == {c: (rank(c, 0), round(most[kind])) for c, kind in kinds.items()}
    for x in h.memory.devices:
        assert x.predicted == max(Needs(here.trainer).of(here.counts(c).train, x.rank) for c in x.clients)


def test_clients_of_buffered_rounds_have_ranks_of_their_own_and_a_resumed_run_ends_the_same(tmp_path):
    from fedpeft.adapters import same
    from fedpeft.report import RunFolder

    devices = {"one": {"tokens_per_second": 40.0, "jitter": 0.3}}
    found = experiment(
        settings(
            tmp_path,
            LEVELS,
            rounds=3,
            schedule={"name": "buffered", "buffer": 2, "concurrency": 5},
            simulation={"engine": "loop", "devices": devices},
            evaluation={"clients": False, "central": False},
            rule={"name": "fedit", "rest": "dropped"},
        )
    )
    simulate(found, tmp_path / "whole", Lines())
    simulate(found, tmp_path / "cut", Lines())
    h = history(tmp_path / "whole")
    assert all(len(x.survivors) == 2 for x in h.rounds)
    RunFolder.open(tmp_path / "cut").checkpoints.files()[-1].unlink()
    simulate(found, tmp_path / "cut", Lines())
    ends = [RunFolder.open(tmp_path / x).checkpoints.load().state.adapter for x in ("whole", "cut")]
    assert same(*ends)
    # What comes down is a letter for each rank: those of low ranks are smaller.
    whole = experiment(found.settings | {"ranks": {"name": "whole"}})
    simulate(whole, tmp_path / "equal", Lines())
    assert h.bytes_down < history(tmp_path / "equal").bytes_down


def test_a_node_says_its_own_rank(tmp_path, monkeypatch):
    monkeypatch.setattr("fedpeft.run.node.sparing", lambda: None)  # which is for this process as a whole

    def said(ranks, client=0, **config):
        found = experiment(settings(tmp_path, ranks))
        state = {"partition-id": client, "state": str(tmp_path / "state")}
        return participant(found.settings_json, state | config).rank(client)

    column, memory = {"name": "column"}, {"name": "memory", "levels": [2, 4, 8]}
    assert said({"name": "whole"}, rank=4) is None
    assert said(LEVELS, rank=4) is None
    assert (said(column), said(column, 7), said(column, rank=7)) == (3, 5, 7)
    assert (said(memory), said(memory, memory=1e15), said(memory, rank=3)) == (8, 8, 3)
    with pytest.raises(ConfigError, match=r"^plan: nothing fits in 0 MB; the least is \d+ MB.*, 1 MB, less 80 MB"):
        said(memory, memory="1MB")
    for wrong in (0, 9, "4", True):
        with pytest.raises(ConfigError, match=rf"^node-config: rank is {wrong!r}; want 1 to 8, the server's"):
            said(column, rank=wrong)
    with pytest.raises(ConfigError, match=r"^node-config: memory: got 'much'; want bytes, such as 4e9 or '4GB'"):
        said(memory, memory="much")


def test_check_tells_what_it_can_of_nodes_with_data_of_their_own(tmp_path):
    own = {
        "data": {"name": "each node's own", "classes": ["a", "b"]},
        "fleet": {"own_data": True, "nodes": 4},
        "evaluation": {"central": False},
        "partition": {"name": "iid"},
    }
    ahead = forecast(experiment(settings(tmp_path, {"name": "levels", "levels": [2, 8]}, **own)))
    assert (ahead.clients, ahead.cohort, ahead.rows, ahead.largest) == (4, 4, 0, 0)
    assert ahead.ranks == ((2, 2), (8, 2))
    said = forecast(experiment(settings(tmp_path, {"name": "column"}, **own)))
    assert (said.ranks, said.told) == ((), 0)
    assert said.bytes_down == ahead.bytes_down > 0


def test_nodes_that_say_their_rank_are_asked_with_it(tmp_path, asked, monkeypatch, capsys):
    notes, peaks = Footprints(), iter([*[600_000_000] * 2, 1_000_000_000, *[600_000_000] * CLIENTS])
    monkeypatch.setattr("fedpeft.run.footing.peak", lambda: next(peaks))
    found = settings(tmp_path, {"name": "column"}, rounds=1, fleet={"wait": 20.0})
    (tmp_path / "own.toml").write_text(tomli_w.dumps(found), encoding="utf8")

    def handle(messages, nodes):
        for message in messages:
            yield from answer(participant, [message], nodes, notes=notes)

    state = {"state": str(tmp_path / "state")}
    nodes = [{"partition-id": c} | state | ({"rank": 7} if c == 2 else {}) for c in range(CLIENTS)]
    config = {"experiment": str(tmp_path / "own.toml"), "folder": str(tmp_path / "run")}
    serve_run(InProcessGrid(handle, nodes), config)
    want = {c: 7 if c == 2 else 3 if c < 4 else 5 for c in range(CLIENTS)}
    assert [x for _, _, x in asked] == [want] * 3
    h = history(tmp_path / "run")
    assert h.rounds[0].survivors == tuple(range(CLIENTS))
    assert {x.rank for x in h.run.clients.values()} == {None}  # known when they have been asked
    assert {x.clients[0]: x.rank for x in h.memory.devices} == want
    assert "Client 2 (torch, rank 7) took 1 GB at its peak, 1." in capsys.readouterr().out.splitlines()[-1]
