"""Clients who draw their rows: seeded, apart from the test rows, and as cheap in a million as in ten."""

import time
import tracemalloc

import numpy as np
import pytest

from fedpeft.data import Federation, Iid, Sampled, Size, Split, Table, federate
from fedpeft.errors import ConfigError

MANY = 1_000_000


def table(rows: int = 600, classes: int = 4) -> Table:
    """Labels of unequal shares: 1/2, 1/4, 1/8, 1/8."""
    labels = np.array([(0, 0, 0, 0, 1, 1, 2, 3)[i % 8] % classes for i in range(rows)], np.int64)
    return Table("classify", tuple(f"text {i}" for i in range(rows)), labels, tuple("abcd"[:classes]))


def made(partitioner: Sampled, split: Split | None = None, seed: int = 5, data: Table | None = None) -> Federation:
    return federate(data or table(), partitioner, split or Split(0.2, 0.2, 0.1), seed)


SOME = (0, 1, 77, 123_456, MANY - 1)


def test_no_row_is_of_two_kinds_whoever_draws_it() -> None:
    found = made(Sampled(300, 20, alpha=0.3))
    kinds = [
        {row for rows in getattr(found, name) for row in rows.tolist()} for name in ("train", "validation", "test")
    ]
    central = set(found.central.tolist())
    assert all(not a & b for i, a in enumerate([*kinds, central]) for b in [*kinds, central][:i])
    assert len(central) == 120
    assert set(found.used().tolist()) == set(range(600))


def test_a_clients_rows_follow_from_the_seed_and_its_number_and_not_from_how_many_there_are() -> None:
    few, many, other = made(Sampled(100, 20)), made(Sampled(MANY, 20)), made(Sampled(100, 20), seed=6)
    for client in (0, 1, 99):
        for name in ("train", "validation", "test"):
            assert few.rows(client, name).tolist() == many.rows(client, name).tolist()
            assert few.rows(client, name).tolist() != other.rows(client, name).tolist()
    assert len({many.rows(client, "train").tobytes() for client in SOME}) == len(SOME)


def test_a_clients_rows_differ_and_ascend_and_are_as_many_as_asked_for() -> None:
    found = made(Sampled(MANY, 20))
    for client in SOME:
        assert all((np.diff(found.rows(client, name)) > 0).all() for name in ("train", "validation", "test"))
        assert found.size(client) == Size(14, 4, 2) == Size(*(len(found.rows(client, x)) for x in Size._fields))
    assert (found.clients, len(found.names), found.names[MANY - 1]) == (MANY, MANY, str(MANY - 1))
    with pytest.raises(ValueError, match="got client 1000000; want 0 to 999999"):
        found.size(MANY)


def test_sizes_are_from_size_to_largest_and_all_as_likely() -> None:
    found = made(Sampled(4000, 4, 8), Split(0.2, 0, 0))
    sizes = np.bincount([x.train for x in found.sizes()], minlength=9)
    assert sizes[:4].sum() == 0
    # Each of 5 is drawn 4,000 times with 1/5: 800 ± 25 (one sigma); 4.5 sigma.
    assert all(abs(n - 800) < 114 for n in sizes[4:])
    assert found.sizes()[17] == found.size(17)


def test_small_alpha_gives_one_sided_clients_and_a_large_one_the_shares_of_the_table() -> None:
    data = table(4000)

    def largest(alpha: float | None) -> float:
        found = made(Sampled(200, 40, alpha=alpha), Split(0.1, 0, 0), data=data)
        return float(np.mean([np.bincount(data.labels[rows]).max() / len(rows) for rows in found.train]))

    assert largest(0.01) > 0.95
    # The commonest label is half of the rows; of 40 drawn, 0.5 ± 0.08 each, so 0.5 ± 0.006 on average, and a little
    # more as it is the largest of four that counts.
    assert largest(1e6) == pytest.approx(0.5, abs=0.03)
    assert largest(None) == pytest.approx(0.5, abs=0.03)


def test_the_mixture_has_the_mean_and_variance_of_its_distribution() -> None:
    # Label a: Beta(α·4·½, α·4·½) of 40 rows: mean ½, variance of the share ¼/(4α+1) + that of 40 draws, (¼ - V)/40.
    # 1,500 clients: the mean's standard error is 0.005, the variance's relative one about 4 %.
    data, alpha = table(4000), 0.7
    found = made(Sampled(1500, 40, alpha=alpha), Split(0.1, 0, 0), data=data)
    share = [(data.labels[rows] == 0).mean() for rows in found.train]
    skew = 0.25 / (4 * alpha + 1)
    assert np.mean(share) == pytest.approx(0.5, abs=0.02)
    assert np.var(share) == pytest.approx(skew + (0.25 - skew) / 40, rel=0.16)


def test_all_parts_of_a_client_have_one_mixture() -> None:
    data = table(4000)
    found = made(Sampled(50, 40, alpha=0.01), Split(0.1, 0.25, 0.25), data=data)
    same = [
        np.bincount(data.labels[found.train[i]]).argmax() == np.bincount(data.labels[found.test[i]]).argmax()
        for i in range(50)
    ]
    assert np.mean(same) > 0.9


def test_a_label_with_too_few_rows_is_made_up_from_the_others() -> None:
    data = Table("classify", tuple(map(str, range(40))), np.array([0] * 3 + [1] * 37), ("a", "b"))
    found = federate(data, Sampled(60, 10, alpha=0.001), Split(0, 0, 0), 1)
    counts = {np.bincount(data.labels[rows], minlength=2)[0] for rows in found.train}
    assert max(counts) == 3
    assert all(len(rows) == 10 for rows in found.train)


@pytest.mark.parametrize(
    ("partitioner", "split", "message"),
    [
        (
            Sampled(9, 700),
            Split(0, 0, 0),
            "partition.size: got 700, for which a client needs 700 different rows for train",
        ),
        (Sampled(9, 3, 700), Split(0, 0, 0), "partition.largest: got 700"),
        (Sampled(9, 500), Split(0.2, 0.1, 0), "there are 432: want fewer"),
    ],
)
def test_more_rows_than_there_are_can_not_be_drawn(partitioner: Sampled, split: Split, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(partitioner, split)


def test_labels_that_do_not_exist_can_not_be_skewed() -> None:
    talk = Table("lm", tuple(map(str, range(50))), ("x",) * 50)
    with pytest.raises(ConfigError, match=r"partition.name: got sampled with alpha, which shares out labels, and lm"):
        federate(talk, Sampled(9, 4, alpha=1.0), Split(), 1)
    assert federate(talk, Sampled(9, 10), Split(), 1).size(8) == Size(8, 1, 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clients": 0}, "clients: got 0; want at least 1"),
        ({"size": 0}, "size: got 0; want at least 1"),
        ({"size": 5, "largest": 4}, "largest: got 4; want at least 5"),
        ({"alpha": 0.0}, "alpha: got 0.0; want a number above 0"),
    ],
)
def test_settings_that_no_data_could_meet_are_refused_when_made(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        Sampled(**fields)  # type: ignore[arg-type]


def test_by_itself_it_shares_out_a_table_like_the_other_partitioners() -> None:
    parts = Sampled(12, 9, 11, 0.5).assign(table(), np.random.default_rng(3))
    again = Sampled(12, 9, 11, 0.5).assign(table(), np.random.default_rng(3))
    assert len(parts) == 12
    assert [x.tolist() for x in parts] == [x.tolist() for x in again]
    assert {len(x) for x in parts} == {9, 10, 11}
    assert [x.tolist() for x in parts[3:5]] == [parts[3].tolist(), parts[4].tolist()]
    with pytest.raises(ConfigError, match="different rows to draw from"):
        Sampled(12, 9, 601).assign(table(), np.random.default_rng(3))


def test_the_union_is_what_all_clients_have() -> None:
    few = made(Sampled(5, 20))
    assert few.union("train").tolist() == sorted({row for rows in few.train for row in rows.tolist()})
    assert few.pooled("test").texts == tuple(f"text {row}" for row in few.union("test"))
    many = made(Sampled(MANY, 20))
    assert many.drawn is not None
    began = time.monotonic()
    assert many.union("train").tolist() == many.drawn.pools[0].tolist()  # it stops once it has all of them
    assert time.monotonic() - began < 20  # a million draws would take minutes


def test_missing_classes_are_those_that_no_client_draws() -> None:
    assert made(Sampled(MANY, 20)).missing_classes() == ()
    few = made(Sampled(1, 2), Split(0, 0, 0))
    labels = set(table().labels[few.train[0]].tolist())
    assert few.missing_classes() == tuple(name for i, name in enumerate("abcd") if i not in labels)
    absent = Table("classify", tuple(map(str, range(40))), np.arange(40) % 2, ("a", "b", "c"))
    assert federate(absent, Sampled(MANY, 5), Split(), 1).missing_classes() == ("c",)  # without asking a million


def test_a_summary_of_very_many_clients_is_of_some_of_them_and_says_so() -> None:
    summary = made(Sampled(MANY, 20, alpha=1.0)).summary()
    assert (summary["population"], len(summary["clients"])) == (MANY, 300)
    chosen = made(Sampled(MANY, 20)).summary([4, 999_999])
    assert [client["client"] for client in chosen["clients"]] == [4, 999_999]
    assert sum(chosen["clients"][0]["labels"]) == 14
    all_of_them = federate(table(), Iid(6), Split(), 1).summary()
    assert (all_of_them["population"], len(all_of_them["clients"])) == (6, 6)


def test_memory_does_not_grow_with_the_clients() -> None:
    def peak(clients: int) -> int:
        tracemalloc.start()
        found = made(Sampled(clients, 20, alpha=0.5))
        for i in range(50):
            found.rows(i * (clients // 50), "train")
            found.size(i)
        found.summary([0, clients - 1])
        found.missing_classes()
        got = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return got

    peak(100)  # what is made at the first use
    assert peak(MANY) - peak(100) < 50_000  # bytes; one pointer a client would be 8 MB
