"""The choice of who goes into a pass: of like length, nobody left behind, the same each time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.training.turns import Turn, choose

LENGTHS, ROWS, LEFT = st.integers(1, 9), st.integers(1, 4), st.integers(1, 5)
TURNS = st.lists(st.builds(Turn, LENGTHS, ROWS, LEFT), min_size=1, max_size=7)


def padding(turns, chosen):
    """Tokens computed for nothing, counted row by row."""
    some = [turns[i] for i in chosen]
    longest, most = max(x.length for x in some), max(x.rows for x in some)
    return sum((longest - x.length) * x.rows + longest * (most - x.rows) for x in some)


def by_length(turns):
    return sorted(range(len(turns)), key=lambda i: (turns[i].length, turns[i].rows, -turns[i].left, i))


def behind(turns):
    """The one that must be chosen: the shortest of those with the most passes left."""
    return next(i for i in by_length(turns) if turns[i].left == max(x.left for x in turns))


@given(TURNS, st.integers(1, 9))
def test_as_many_are_chosen_as_fit_each_once(turns, most):
    found = choose(turns, most)
    assert len(found) == min(most, len(turns))
    assert len(set(found)) == len(found)
    assert set(found) <= set(range(len(turns)))


@given(TURNS, st.integers(1, 9))
def test_one_that_is_furthest_behind_is_among_the_chosen(turns, most):
    assert max(turns[i].left for i in choose(turns, most)) == max(x.left for x in turns)


@given(TURNS, st.integers(1, 9))
def test_the_same_turns_give_the_same_choice(turns, most):
    assert choose(turns, most) == choose(list(turns), most)


@given(TURNS, st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_the_padding_is_the_least_of_neighbours_in_length_with_the_one_behind(turns, most):
    found = choose(turns, most)
    order, size = by_length(turns), len(found)
    neighbours = [order[i : i + size] for i in range(len(order) - size + 1)]
    assert padding(turns, found) == min(padding(turns, x) for x in neighbours if behind(turns) in x)


@pytest.mark.parametrize(
    ("turns", "most", "chosen"),
    [
        ([(9, 1, 1), (2, 1, 1), (8, 1, 1), (3, 1, 2)], 2, [1, 3]),  # 3 is behind; 2 tokens are nearer to it than 8
        ([(9, 1, 1), (2, 1, 1), (8, 1, 3), (3, 1, 2)], 2, [2, 0]),
        ([(5, 4, 1), (5, 1, 2), (5, 2, 1)], 2, [1, 2]),  # of like length, those of like rows
        ([(5, 1, 1), (5, 1, 1), (5, 1, 1)], 2, [0, 1]),
        ([(5, 1, 1), (5, 1, 2), (5, 1, 1)], 1, [1]),
        ([(3, 1, 1), (4, 1, 2), (5, 1, 1)], 2, [0, 1]),  # either neighbour: the shorter
        ([(1, 5, 1), (9, 1, 2), (10, 5, 1)], 2, [1, 2]),  # 10·5·2 − 9 − 50 = 41 for nothing, not 9·5·2 − 5 − 9 = 76
        ([], 3, []),
    ],
)
def test_examples_of_the_choice(turns, most, chosen):
    assert choose([Turn(*x) for x in turns], most) == chosen


def test_none_at_a_time_is_refused():
    with pytest.raises(ValueError, match="most: got 0; want at least 1"):
        choose([Turn(1, 1, 1)], 0)


def test_all_that_are_chosen_turn_by_turn_finish_near_one_another():
    """Eight clients of one to eight passes, two at a time: no pass is of one client alone until the last is."""
    left = list(range(1, 9))
    sizes = []
    while any(left):
        here = [i for i, n in enumerate(left) if n]
        chosen = choose([Turn(5, 2, left[i]) for i in here], 2)
        sizes.append(len(chosen))
        for i in chosen:
            left[here[i]] -= 1
    assert sizes == [2] * 18
