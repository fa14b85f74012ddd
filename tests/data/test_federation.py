"""Federations: what is held out, what the cap takes, and that a seed means the same everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data import (
    Dirichlet,
    Federation,
    Iid,
    Natural,
    Partitioner,
    Quantity,
    Shards,
    Size,
    Split,
    Table,
    federate,
    own,
)
from fedpeft.errors import ConfigError, DataError


def table(rows: int = 240, classes: int = 4, users: int = 6) -> Table:
    """User u has about u + 1 shares of the rows; the labels go round."""
    who = np.repeat(np.arange(users), np.arange(1, users + 1))
    names = tuple(f"user {who[i % len(who)]}" for i in range(rows))
    labels = (np.arange(rows) % classes).astype(np.int64)
    return Table("classify", tuple(f"text {i}" for i in range(rows)), labels, tuple("abcdefgh"[:classes]), names)


def places(found: Federation) -> list[list[int]]:
    return [rows.tolist() for part in (found.train, found.validation, found.test) for rows in part] + [
        found.central.tolist()
    ]


EACH: list[Partitioner] = [Iid(5), Dirichlet(5, 0.2), Shards(5, 2), Quantity(5, 0.3), Natural(least=4), Natural(3, 4)]


@pytest.mark.parametrize("partitioner", EACH, ids=repr)
@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**33),
    examples=st.sampled_from([None, 60, 100, 240, 500]),
    central=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    validation=st.sampled_from([0.0, 0.1, 0.45]),
    test=st.sampled_from([0.0, 0.1, 0.5]),
)
def test_no_row_is_in_two_places_and_every_client_trains(
    partitioner: Partitioner, seed: int, examples: int | None, central: float, validation: float, test: float
) -> None:
    if not partitioner.is_natural and (examples or 240) * (1 - central) < 5 * partitioner.fewest:
        return
    found = federate(table(), partitioner, Split(central, validation, test), seed, examples)
    rows = [row for place in places(found) for row in place]
    assert len(set(rows)) == len(rows) <= min(240, examples or 240)
    if examples is not None and not (partitioner.is_natural and examples >= 240):
        assert len(rows) == min(examples, 240, len(rows) if partitioner.is_natural else 240)
    assert min(size.train for size in found.sizes()) >= 1
    assert all(place == sorted(place) for place in places(found))
    assert found.clients == len(found.names) == len(found.train) == len(found.validation) == len(found.test)


def test_shares_are_those_asked_for() -> None:
    found = federate(table(200), Iid(8), Split(0.2, 0.1, 0.15), 1)
    assert len(found.central) == 40
    assert found.sizes() == (Size(15, 2, 3),) * 8


def test_the_cap_counts_all_rows_of_the_federation() -> None:
    found = federate(table(), Iid(4), Split(0.25, 0.1, 0.1), 1, examples=80)
    assert (len(found.central), sum(map(sum, found.sizes()))) == (20, 60)


def test_natural_clients_are_held_out_from_in_proportion_and_keep_their_names() -> None:
    found = federate(table(210), Natural(least=10), Split(0.3, 0.1, 0.1), 4)
    assert found.names == tuple(f"user {i}" for i in range(6))
    assert len(found.central) == 63
    who = found.table.clients
    assert who is not None
    assert [sum(who[row] == name for row in found.central) for name in found.names] == [3, 6, 9, 12, 15, 18]
    for i, name in enumerate(found.names):
        assert set(found.table.take(found.train[i]).clients or ()) == {name}


def test_the_cap_takes_from_natural_clients_in_proportion_after_they_are_chosen() -> None:
    found = federate(table(210), Natural(least=5), Split(0, 0, 0), 4, examples=120)
    # 210 rows of 10, 20, ... 60: 5 each, and half of the 180 above that to share: 90 * (5, 15, ... 55) / 180.
    assert [size.train for size in found.sizes()] == [8, 12, 18, 22, 28, 32]
    assert sum(size.train for size in found.sizes()) == 120


def test_the_cap_never_makes_a_natural_client_too_small() -> None:
    found = federate(table(210), Natural(least=5), Split(0, 0, 0), 4, examples=30)
    assert [size.train for size in found.sizes()] == [5] * 6
    with pytest.raises(
        ConfigError, match=r"data.examples: got 29; want at least 30, 5 \(partition.least\) for each of 6"
    ):
        federate(table(210), Natural(least=5), Split(0, 0, 0), 4, examples=29)


def test_the_cap_draws_rows_and_does_not_take_the_first() -> None:
    for partitioner in (Iid(2), Natural(2, 5)):
        found = federate(table(), partitioner, Split(0, 0, 0), 4, examples=20)
        assert max(row for place in places(found) for row in place) > 120
    assert max(own(table(), Split(), 1, examples=20).train[0]) > 120


def test_equal_rows_count_once_wherever_they_are() -> None:
    once = table(40, users=2)
    twice = once.take(np.concatenate([np.arange(40), np.arange(39, 9, -1)]))
    for found in (federate(twice, Iid(3), Split(), 1), federate(twice, Natural(), Split(), 1), own(twice, Split(), 1)):
        rows = [row for place in places(found) for row in place]
        assert sorted(rows) == list(range(40))
        assert found.duplicates == 30


def test_equal_texts_are_on_one_side_even_with_two_labels() -> None:
    data = Table("classify", ("same",) * 5 + ("other", "third"), np.array([0, 1, 0, 1, 0, 1, 0]), ("a", "b"))
    found = federate(data, Iid(2), Split(0.3, 0, 0), 0)
    assert sorted(row for place in places(found) for row in place) == [0, 5, 6]


def test_parts_are_tables_of_those_rows() -> None:
    found = federate(table(), Iid(4), Split(), 7)
    for name in ("train", "validation", "test"):
        for client in range(4):
            part = found.part(client, name)
            assert part.texts == tuple(f"text {row}" for row in getattr(found, name)[client])
        pooled = found.pooled(name)
        assert pooled.texts == tuple(f"text {row}" for row in sorted(np.concatenate(getattr(found, name)).tolist()))
    assert found.part(None, "test").texts == tuple(f"text {row}" for row in found.central)


@pytest.mark.parametrize(
    ("client", "name", "message"),
    [
        (4, "train", "got client 4; want 0 to 3"),
        (-1, "train", "got client -1; want 0 to 3"),
        (0, "training", "got 'training'; want train, validation or test"),
        (None, "validation", "got 'validation' of no client; want 'test', and a share split.central above 0"),
    ],
)
def test_parts_that_are_not_there_are_refused(client: int | None, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        federate(table(), Iid(4), Split(), 7).part(client, name)  # type: ignore[arg-type]  # names that are wrong


def test_a_federation_without_a_central_test_set_says_so() -> None:
    found = federate(table(), Iid(4), Split(central=0), 7)
    assert len(found.central) == 0
    with pytest.raises(ValueError, match=r"want 'test', and a share split.central above 0"):
        found.part(None, "test")


def test_a_small_share_still_gives_a_central_test_set_of_one_row() -> None:
    assert len(federate(table(9), Iid(2), Split(central=0.01), 7).central) == 1


def test_classes_that_no_client_trains_on_are_named() -> None:
    data = Table("classify", tuple("uvwxyz"), np.array([0, 0, 2, 2, 2, 2]), ("a", "b", "c", "d"))
    found = federate(data, Iid(2), Split(0, 0, 0), 1)
    assert found.missing_classes() == ("b", "d")
    assert federate(table(), Iid(2), Split(), 1).missing_classes() == ()
    assert federate(Table("lm", ("a", "b"), ("c", "d")), Iid(2), Split(0, 0, 0), 1).missing_classes() == ()


def test_the_summary_is_plain_and_adds_up() -> None:
    found = federate(table(), Dirichlet(4, 0.3), Split(), 7)
    summary = json.loads(json.dumps(found.summary()))
    assert (summary["rows"], summary["central"], summary["duplicates"], summary["task"]) == (240, 48, 0, "classify")
    assert summary["classes"] == ["a", "b", "c", "d"]
    assert summary["fingerprint"] == table().fingerprint
    assert [client["client"] for client in summary["clients"]] == [0, 1, 2, 3]
    for client, size, rows in zip(summary["clients"], found.sizes(), found.train, strict=True):
        assert Size(client["train"], client["validation"], client["test"]) == size
        assert client["labels"] == [int((found.table.labels[rows] == k).sum()) for k in range(4)]
        assert client["name"] == str(client["client"])
    talk = federate(Table("lm", ("a", "b"), ("c", "d")), Iid(2), Split(0, 0, 0), 1).summary()
    assert [client["labels"] for client in talk["clients"]] == [[], []]


def test_a_node_with_its_own_data_is_a_federation_of_one() -> None:
    found = own(table(100), Split(0.5, 0.1, 0.2), 3, client=7)
    assert (found.clients, found.names, found.sizes(), len(found.central)) == (1, ("7",), (Size(70, 10, 20),), 0)
    assert len(found.part(7, "test")) == 20
    with pytest.raises(ValueError, match="got client 0; want 7 to 7"):
        found.part(0, "train")
    assert found.summary()["clients"][0]["client"] == 7
    assert places(found) != places(own(table(100), Split(0.5, 0.1, 0.2), 3, client=8))


def test_one_row_is_trained_on_and_not_held_out() -> None:
    assert own(table(100).take(np.array([4])), Split(0.9, 0.45, 0.45), 0).sizes() == (Size(1, 0, 0),)
    assert own(table(100).take(np.array([4, 5])), Split(0.9, 0.45, 0.5), 0).sizes() == (Size(1, 1, 0),)


def test_no_rows_are_refused() -> None:
    empty = table().take(np.array([], np.int64))
    for make in (lambda: own(empty, Split(), 0), lambda: federate(empty, Iid(1), Split(), 0)):
        with pytest.raises(DataError, match="the data set has no rows"):
            make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"central": 1.0}, "central: got 1.0; want at least 0 and less than 1"),
        ({"central": float("nan")}, "central: got nan; want at least 0 and less than 1"),
        ({"validation": -0.1}, "validation: got -0.1; want at least 0 and less than 1"),
        ({"test": 1.5}, "test: got 1.5; want at least 0 and less than 1"),
        ({"validation": 0.5, "test": 0.5}, "test: got 0.5 beside validation 0.5; want less than 1 together"),
    ],
)
def test_impossible_splits_are_refused_when_made(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Split(**fields)


@pytest.mark.parametrize("partitioner", [Iid(6), Natural()], ids=repr)
def test_clients_are_held_out_from_independently(partitioner: Partitioner) -> None:
    who = tuple(f"user {i % 6}" for i in range(240))
    data = Table("lm", tuple(map(str, range(240))), ("x",) * 240, (), who)
    found = federate(data, partitioner, Split(0.25, 0.2, 0.2), 1)
    places_of_validation = [
        tuple(np.searchsorted(np.sort(np.concatenate(parts)), parts[1]).tolist())
        for parts in zip(found.train, found.validation, found.test, strict=True)
    ]
    assert len(set(places_of_validation)) == 6
    other = federate(data, partitioner, Split(0.25, 0.2, 0.2), 2)
    assert other.central.tolist() != found.central.tolist()


@pytest.mark.parametrize("partitioner", EACH, ids=repr)
def test_another_seed_gives_other_rows_everywhere(partitioner: Partitioner) -> None:
    one, two = (federate(table(), partitioner, Split(), seed, 200) for seed in (1, 2))
    assert one.central.tolist() != two.central.tolist()
    assert all(a.tolist() != b.tolist() for a, b in zip(one.train, two.train, strict=True))


SCRIPT = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import test_federation as t
print(json.dumps([t.places(t.federate(t.table(), p, t.Split(), 11, 200)) for p in t.EACH]))
"""


def test_the_same_seed_gives_the_same_rows_in_another_process() -> None:
    here = Path(__file__)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([str(here.parent), str(here.parents[2])])],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "12345", "PATH": ""},
    )
    assert json.loads(run.stdout) == [places(federate(table(), p, Split(), 11, 200)) for p in EACH]
