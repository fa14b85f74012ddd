"""How much one client counts."""

from math import sqrt

import pytest

from fedpeft.rules import Examples, SquareRoot, Uniform


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [
        (Examples(), {1: 1.0, 7.0: 7.0, 100_000: 1e5, 100_001: 1e5, 10**9: 1e5}),
        (Examples(5), {4: 4.0, 5: 5.0, 6: 5.0}),
        (SquareRoot(), {1: 1.0, 9: 3.0, 2: sqrt(2), 10**9: sqrt(100_000)}),
        (SquareRoot(4), {3: sqrt(3), 4: 2.0, 5: 2.0}),
        (Uniform(), {1: 1.0, 10**9: 1.0}),
    ],
    ids=repr,
)
def test_a_clients_weight_follows_its_examples_up_to_the_cap(weighting, weights):
    assert {n: weighting.weight(n) for n in weights} == weights
    assert all(type(weighting.weight(n)) is float for n in weights)


@pytest.mark.parametrize(
    ("weighting", "largest"),
    [(Examples(), 1e5), (Examples(1), 1.0), (SquareRoot(), sqrt(1e5)), (SquareRoot(9), 3.0), (Uniform(), 1.0)],
    ids=repr,
)
def test_no_weight_is_above_the_largest(weighting, largest):
    assert weighting.largest == largest
    assert type(weighting.largest) is float
    assert weighting.weight(10**12) == largest


@pytest.mark.parametrize("weighting", [Examples, SquareRoot])
def test_a_cap_of_one_makes_all_who_train_equal(weighting):
    assert weighting(1).weight(7) == weighting(1).largest == 1.0


@pytest.mark.parametrize("weighting", [Examples, SquareRoot])
@pytest.mark.parametrize("cap", [0, -4])
def test_a_cap_below_one_is_refused(weighting, cap):
    with pytest.raises(ValueError, match=f"^cap: got {cap}; want at least 1$"):
        weighting(cap)
