"""The parts of figures that are computed: places of labels, work over time, label tables, units."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.report import ClientData, RunFolder, RunRecord, history
from fedpeft.report.costs import amount, at_work, timeline, traffic
from fedpeft.report.drawing import spread_out
from fedpeft.report.plots import clients, curves, spread
from fedpeft.report.population import population, table

Make = Callable[..., RunFolder]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).map(sorted))
def test_labels_never_overlap_keep_their_order_and_stay_inside_where_there_is_room(at: list[float]) -> None:
    places = spread_out(at, 12.0, 0.0, 100.0)
    assert len(places) == len(at)
    assert all(b - a >= 12.0 - 1e-9 for a, b in pairwise(places))
    assert places[0] >= -1e-9
    assert places[-1] <= 100.0 + 1e-9


def test_labels_with_room_stay_where_they_are_and_a_pair_moves_apart_evenly() -> None:
    assert spread_out([10.0, 40.0, 80.0], 12.0, 0.0, 100.0) == [10.0, 40.0, 80.0]
    assert spread_out([50.0, 52.0], 12.0, 0.0, 100.0) == [45.0, 57.0]
    assert spread_out([50.0, 50.0, 50.0], 10.0, 0.0, 100.0) == [40.0, 50.0, 60.0]


def test_the_number_at_work_counts_overlaps_and_touching_ends() -> None:
    times, working = at_work([(0.0, 2.0), (1.0, 3.0), (3.0, 4.0)])
    assert times.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert working.tolist() == [1, 2, 1, 1, 0]


def test_labels_are_ordered_by_count_and_the_rarest_are_taken_together() -> None:
    people = {4: ClientData(3, {"b": 2, "a": 1}), 7: ClientData(5, {"a": 4, "c": 1}), 9: ClientData(0)}
    names, counts = table(people)
    assert names == ["a", "b", "c"]
    assert counts.tolist() == [[1, 2, 0], [4, 0, 1], [0, 0, 0]]
    many = {0: ClientData(820, {f"label {n}": 40 - n for n in range(40)})}
    names, counts = table(many)
    assert (len(names), names[0], names[-1]) == (30, "label 0", "11 rarer labels")
    assert counts.sum() == 820
    assert table({1: ClientData(2)})[1].shape == (1, 0)
    assert table({1: ClientData(2, {"x" * 50: 2})})[0] == ["x" * 23 + "…"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1182, "1.18 kB"),
        (1.5e6, "1.5 MB"),
        (123.4e6, "123 MB"),
        (5.914e9, "5.91 GB"),
    ],
)
def test_bytes_read_well(size: float, text: str) -> None:
    assert amount(size) == text


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_figures_name_what_they_show(run: Make) -> None:
    h = history(run(clients=12, rounds=6).path)
    assert {"central test", "base model", "local only", "centralised", "Accuracy", "Loss"} <= set(texts(curves(h)))
    assert {"median client", "best", "worst", "upper quartile"} <= set(texts(spread(h)))
    assert {"federated", "local only"} <= set(texts(clients(h)))
    assert any(x.startswith("up ") for x in texts(traffic(h)))
    assert "round 1" in texts(timeline(h))
    assert "Mathematics" in texts(population(h))


def test_a_language_model_is_shown_by_next_tokens_and_perplexity(run: Make) -> None:
    svg = texts(curves(history(run(task="lm", clients=4, rounds=3).path)))
    assert "Next-token accuracy" in svg
    assert any(x.startswith("Perplexity") for x in svg)


def test_what_was_not_recorded_is_not_drawn(run: Make) -> None:
    h = history(run(rounds_recorded=0, baselines=False).path)
    assert [draw(h) for draw in (spread, clients, traffic, timeline)] == ["", "", "", ""]
    assert spread(history(run(clients=1, rounds=2, fraction=1.0).path)) == ""


def test_a_crowd_is_drawn_in_a_few_hundred_kilobytes(run: Make) -> None:
    h = history(run(clients=1000, rounds=4, fraction=1.0).path)
    sizes = {draw.__name__: len(draw(h)) for draw in (spread, clients, timeline, population)}
    assert max(sizes.values()) < 600_000, sizes
    assert "Number of clients by gain" in texts(clients(h))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize(("sizes", "bars"), [((6,), 1), ((4, 5, 9), 6), ((10, 900), 40)])
def test_a_sample_of_very_many_clients_is_drawn_as_a_distribution(
    run: Make, labels: bool, sizes: tuple[int, ...], bars: int
) -> None:
    people = {n * 1000: ClientData(sizes[n % len(sizes)], {"a": 1, "b": n % 3} if labels else {}) for n in range(60)}
    folder = run(clients=3, rounds=1)
    h = replace(history(folder.path), run=RunRecord("many", clients=people, population=1_000_000))
    svg = population(h)
    assert "Training rows of a client, of 60 of the 1,000,000 clients" in texts(svg)
    assert svg.count("fill: #2f78b7") == bars
    told = {"Share of each label among a client's rows", "60 clients, by their commonest label"} if labels else {"rows"}
    assert told <= set(texts(svg))


def test_drawing_leaves_the_settings_of_matplotlib_alone(run: Make) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    first = curves(history(run(clients=3, rounds=2).path))
    assert dict(mpl.rcParams) == before
    with mpl.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.prop_cycle": mpl.cycler(color="k")}):
        again = curves(history(run(clients=3, rounds=2).path))
    assert again == first
    assert np.all([x in first for x in ("viewBox", 'role="img"')])
