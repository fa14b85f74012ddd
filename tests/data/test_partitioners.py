"""Partitioners: laws over all of them, limits of the skewed ones, and what each refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data import Dirichlet, Iid, Natural, Partitioner, Quantity, Shards, Table
from fedpeft.data.shares import dirichlet, fill, whole
from fedpeft.errors import ConfigError


def table(rows: int, classes: int = 3, users: int = 4, seed: int = 5) -> Table:
    """Labels and users at random, but every class and user at least once."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=rows - classes)]).astype(np.int64)
    who = np.concatenate([np.arange(users), rng.integers(users, size=rows - users)])
    names = tuple(f"user {i}" for i in who)
    return Table("classify", tuple(f"text {i}" for i in range(rows)), labels, tuple("abcdefghijkl"[:classes]), names)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


EACH = [
    Iid(7),
    Dirichlet(7, 0.05, 2),
    Dirichlet(7, 3.0, 1),
    Shards(7, 2),
    Quantity(7, 0.1, 3),
    Natural(None, 5),
    Natural(3, 5),
]


@pytest.mark.parametrize("partitioner", EACH, ids=repr)
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(60, 200), seed=st.integers(0, 2**40))
def test_parts_are_ascending_disjoint_and_not_too_small(partitioner: Partitioner, rows: int, seed: int) -> None:
    parts = partitioner.assign(table(rows), rng(seed))
    every = np.concatenate(parts)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert len(set(every.tolist())) == len(every)
    assert min(map(len, parts)) >= partitioner.fewest
    if not partitioner.is_natural:
        assert sorted(every.tolist()) == list(range(rows))
        assert len(parts) == 7


@pytest.mark.parametrize("partitioner", EACH, ids=repr)
def test_the_seed_alone_decides(partitioner: Partitioner) -> None:
    def draw(seed: int) -> list[list[int]]:
        return [part.tolist() for part in partitioner.assign(table(150, users=9), rng(seed))]

    assert draw(3) == draw(3)
    is_all = isinstance(partitioner, Natural) and partitioner.clients is None
    assert (draw(3) == draw(4)) == is_all


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 50), clients=st.integers(1, 50), seed=st.integers(0, 99))
def test_iid_sizes_differ_by_one_at_most(rows: int, clients: int, seed: int) -> None:
    if clients > rows:
        with pytest.raises(ConfigError, match=f"partition.clients: got {clients}.*want at most {rows}"):
            Iid(clients).assign(table(rows, 1, 1), rng(seed))
    else:
        sizes = {len(part) for part in Iid(clients).assign(table(rows, 1, 1), rng(seed))}
        assert max(sizes) - min(sizes) <= 1


def test_iid_draws_rows_uniformly() -> None:
    # The first client's share of the first half: 400 of 2000 rows, hypergeometric, so 200 ± 9 (one sigma); 5 sigma.
    first = Iid(5).assign(table(2000), rng(1))[0]
    assert abs(int((first < 1000).sum()) - 200) < 45


@pytest.mark.parametrize("alpha", [1e-300, 1e-9, 1e-3])
def test_dirichlet_with_alpha_near_zero_gives_each_label_to_one_client(alpha: float) -> None:
    data = table(300, classes=5)
    parts = Dirichlet(9, alpha, 2).assign(data, rng(2))
    for label in range(5):
        held = sorted(int((data.labels[part] == label).sum()) for part in parts)
        # All but what the clients without any label were given: at most 2 rows for each of 9 clients.
        assert held[-1] >= (data.labels == label).sum() - 18
    assert all(len(np.unique(data.labels[part])) <= 5 for part in parts)
    poor = [part for part in parts if len(part) == 2]
    assert len(poor) >= 4
    assert all(len(np.unique(data.labels[part])) == 1 for part in poor)


@pytest.mark.parametrize("alpha", [1e6, 1e300])
def test_dirichlet_with_a_large_alpha_gives_every_client_the_same_mixture(alpha: float) -> None:
    data = table(1000, classes=4)
    for part in Dirichlet(8, alpha).assign(data, rng(3)):
        share = data.take(part).histogram()
        # Systematic rounding keeps each count within one of its share; alpha of 1e6 moves a share of 32 by < 0.1.
        assert all(abs(have - of / 8) <= 1.1 for have, of in zip(share, data.histogram(), strict=True))


def test_dirichlet_skew_has_the_variance_of_its_distribution() -> None:
    # A client's share of a label is Beta(α, (n-1)α): variance (1/n)(1-1/n)/(nα+1). 5 clients, 4 labels, 300 draws of
    # 5000 rows, so 6000 shares; their sample variance has a relative error of about 2 %; 10 % is allowed.
    data = table(5000, classes=4)
    shares = [
        np.array(data.take(part).histogram()) / np.array(data.histogram())
        for seed in range(300)
        for part in Dirichlet(5, 0.7, 1).assign(data, rng(seed))
    ]
    assert np.mean(shares) == pytest.approx(0.2, rel=1e-9)
    assert np.var(shares) == pytest.approx(0.2 * 0.8 / (5 * 0.7 + 1), rel=0.1)


def test_small_labels_do_not_always_go_to_the_same_clients() -> None:
    # 40 labels of one row each and equal shares: without a random offset one client would get them all.
    data = Table("classify", tuple(map(str, range(40))), np.arange(40), tuple(map(str, range(40))))
    sizes = [len(part) for part in Dirichlet(4, 1e9, 1).assign(data, rng(1))]
    assert max(sizes) <= 20


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(40, 150),
    classes=st.integers(1, 6),
    clients=st.integers(1, 9),
    labels=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_shards_give_each_client_exactly_the_number_of_labels(
    rows: int, classes: int, clients: int, labels: int, seed: int
) -> None:
    data = table(rows, classes, seed=seed)
    most = sum(min(clients, size) for size in data.histogram())
    if labels > classes or clients * labels < classes or clients * labels > most:
        with pytest.raises(ConfigError, match=f"partition.labels: got {labels}"):
            Shards(clients, labels).assign(data, rng(seed))
        return
    parts = Shards(clients, labels).assign(data, rng(seed))
    assert [len(np.unique(data.labels[part])) for part in parts] == [labels] * clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))


def test_shards_are_as_equal_as_the_labels_allow() -> None:
    labels = np.repeat([0, 1, 2], [60, 20, 20]).astype(np.int64)
    data = Table("classify", tuple(map(str, range(100))), labels, ("a", "b", "c"))
    parts = Shards(5, 1).assign(data, rng(0))
    assert [len(part) for part in parts] == [20] * 5


def test_quantity_has_the_sizes_of_its_distribution() -> None:
    # Least plus a Dirichlet share of the rest: variance (600 - 5·4)² · (1/5)(4/5)/(5α+1); 400 draws of 5 sizes, 15 %.
    sizes = np.array([[len(part) for part in Quantity(5, 0.5, 4).assign(table(600), rng(seed))] for seed in range(400)])
    assert (sizes.sum(1) == 600).all()
    assert np.var(sizes) == pytest.approx(580**2 * 0.16 / 3.5, rel=0.15)
    even = [len(part) for part in Quantity(6, 1e9).assign(table(600), rng(0))]
    assert max(even) - min(even) <= 1


def test_natural_takes_all_clients_that_are_large_enough_in_the_order_of_their_names() -> None:
    who = ("dot",) * 3 + ("ann",) * 4 + ("cy",) * 2 + ("bob",) * 5
    data = Table("lm", tuple(map(str, range(14))), ("x",) * 14, (), who)
    partitioner = Natural(least=3)
    parts = partitioner.assign(data, rng(0))
    assert partitioner.names(data, parts) == ("ann", "bob", "dot")
    assert [part.tolist() for part in parts] == [[3, 4, 5, 6], [9, 10, 11, 12, 13], [0, 1, 2]]


def test_natural_draws_clients_uniformly_and_not_by_size() -> None:
    who = tuple(f"{name}" for name, size in zip("abcdef", (90, 50, 9, 8, 7, 6), strict=True) for _ in range(size))
    data = Table("lm", tuple(map(str, range(len(who)))), ("x",) * len(who), (), who)
    partitioner = Natural(2, 6)
    drawn = [partitioner.names(data, partitioner.assign(data, rng(seed))) for seed in range(300)]
    assert all(list(names) == sorted(names) for names in drawn)
    # Each of 6 is in 100 of 300 draws of two, ± 8.2 (one sigma); 4 sigma.
    assert all(67 < sum(name in names for names in drawn) < 133 for name in "abcdef")


def test_clients_without_names_are_called_by_number() -> None:
    data = table(30)
    assert Iid(3).names(data, Iid(3).assign(data, rng())) == ("0", "1", "2")


def test_the_names_of_natural_clients_need_a_table_that_has_them() -> None:
    with pytest.raises(ValueError, match="got a table without clients"):
        Natural().names(Table("lm", ("a",), ("b",)), [np.array([0])])


PROMPTS = Table("lm", ("a",) * 30, ("b",) * 30)


@pytest.mark.parametrize(
    ("partitioner", "data", "message"),
    [
        (
            Iid(31),
            PROMPTS,
            "partition.clients: got 31, with 1 rows at least for each; want at most 30, as there are 30",
        ),
        (Dirichlet(16, 1, 2), table(30), "partition.clients: got 16, with 2 rows at least for each; want at most 15"),
        (Quantity(11, 1, 3), table(30), "partition.clients: got 11, with 3 rows at least for each; want at most 10"),
        (
            Dirichlet(3),
            PROMPTS,
            "partition.name: got dirichlet, which shares out labels, and lm data has none; want iid",
        ),
        (Shards(3), PROMPTS, "partition.name: got shards, which shares out labels, and lm data has none; want iid"),
        (Shards(9, 4), table(30), "partition.labels: got 4; want at most 3, the number of labels"),
        (Shards(2, 1), table(30), "partition.labels: got 1 for each of 2 clients, too few for all of the 3 labels"),
        (Shards(31, 1), table(30), "partition.labels: got 1 for each of 31 clients; want at most 30 in all"),
        (Natural(), PROMPTS, "partition.name: got natural, and .* name the column that does with data.client"),
        (Natural(least=40), table(30, users=2), r"partition.least: got 40; want at most \d+, the rows of the largest"),
        (Natural(3, 2), table(30, users=2), "partition.clients: got 3; want at most 2, the number of clients with 2"),
    ],
)
def test_settings_that_the_data_cannot_meet_are_refused_by_key(
    partitioner: Partitioner, data: Table, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        partitioner.assign(data, rng())


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Iid, {"clients": 0}, "clients: got 0; want at least 1"),
        (Dirichlet, {"clients": 0}, "clients: got 0; want at least 1"),
        (Dirichlet, {"alpha": 0.0}, "alpha: got 0.0; want a number above 0"),
        (Dirichlet, {"alpha": float("nan")}, "alpha: got nan; want a number above 0"),
        (Dirichlet, {"alpha": float("inf")}, "alpha: got inf; want a number above 0"),
        (Dirichlet, {"least": 0}, "least: got 0; want at least 1"),
        (Shards, {"clients": 0}, "clients: got 0; want at least 1"),
        (Shards, {"labels": 0}, "labels: got 0; want at least 1"),
        (Quantity, {"clients": -1}, "clients: got -1; want at least 1"),
        (Quantity, {"alpha": -2.0}, "alpha: got -2.0; want a number above 0"),
        (Quantity, {"least": 0}, "least: got 0; want at least 1"),
        (Natural, {"clients": 0}, "clients: got 0; want at least 1"),
        (Natural, {"least": 0}, "least: got 0; want at least 1"),
    ],
)
def test_settings_that_no_data_could_meet_are_refused_when_made(
    cls: type[Partitioner], fields: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        cls(**fields)


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=20), st.floats(0, 0.999), st.integers(0, 500))
def test_whole_numbers_are_near_their_amounts_and_sum_to_theirs(
    amounts: list[float], offset: float, total: int
) -> None:
    shares = np.array(amounts) * total / np.sum(amounts)
    for each, out, want in (
        (shares, whole(shares, offset), total),
        (np.array(amounts), whole(np.array(amounts)), int(np.floor(np.sum(amounts) + 0.5))),
    ):
        assert (out >= 0).all()
        assert out.sum() == want
        assert (np.abs(out - each) <= 1 + 1e-9).all()  # 1e-9: sums of floats


def test_whole_numbers_have_their_amounts_as_means() -> None:
    # 20,000 offsets on a grid: the mean is exact to one grid step for each boundary.
    amounts = np.array([0.3, 1.75, 0.0, 2.95])
    mean = np.mean([whole(amounts, (i + 0.5) / 20_000) for i in range(20_000)], axis=0)
    assert mean == pytest.approx(amounts, abs=2e-4)


def test_dirichlet_shares_that_underflow_go_to_one_whole() -> None:
    class Underflowing(np.random.Generator):
        def dirichlet(self, alpha: object, size: object = None) -> np.ndarray:
            return np.full(3, np.nan)

    shares = dirichlet(0.1, 3, Underflowing(np.random.PCG64(1)))
    assert sorted(shares.tolist()) == [0, 0, 1]


def test_filling_takes_from_the_largest_its_commonest_label() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
    parts = fill([np.array([0, 1, 2, 3]), np.array([], np.int64), np.array([4, 5, 6, 7, 8])], labels, 2)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [5, 6], [4, 7, 8]]
    # The largest gives no more than it can spare, then the next one gives.
    thin = fill([np.array([0, 1, 2]), np.array([3, 4, 7]), np.array([], np.int64)], labels, 2)
    assert [part.tolist() for part in thin] == [[1, 2], [4, 7], [0, 3]]
