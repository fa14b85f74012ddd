"""Who has which rank: exact shares, drawn once or anew, lists with a rest, and what says its own."""

from collections import Counter

import pytest

from fedpeft.errors import ConfigError
from fedpeft.rounds import WHOLE, Column, Levels, Listed, Memory, Whole


def drawn(ranks, clients=20, seed=5, round=0):
    return [ranks.of(c, clients, seed, round) for c in range(clients)]


def test_whole_is_more_than_any_layer_has():
    assert drawn(Whole(), 3) == [WHOLE] * 3
    assert (WHOLE, Whole().is_whole, Levels((2,)).is_whole) == (1 << 30, True, False)
    assert (Whole().is_said, Whole().changes, Whole().named) == (False, False, {})


def test_levels_have_exact_shares_equal_ones_where_none_are_given():
    assert Counter(drawn(Levels((2, 4, 8, 16, 32)))) == {2: 4, 4: 4, 8: 4, 16: 4, 32: 4}
    assert Counter(drawn(Levels((2, 8), (3.0, 1.0)))) == {2: 15, 8: 5}
    assert Counter(drawn(Levels((2, 4, 8)), 11)) == {2: 4, 4: 4, 8: 3}
    assert Counter(drawn(Levels((2, 4), (0.0, 1.0)))) == {4: 20}


def test_who_has_which_level_follows_from_the_seed_and_stays_all_through_the_run():
    ranks = Levels((2, 4, 8, 16, 32))
    first = drawn(ranks)
    assert first != sorted(first)
    assert [drawn(ranks, round=r) for r in range(4)] == [first] * 4
    assert drawn(ranks, seed=6) != first
    assert not ranks.changes


def test_levels_that_are_redrawn_are_others_in_every_round_with_the_same_shares():
    ranks = Levels((2, 4, 8, 16, 32), redraw=True)
    rounds = [drawn(ranks, round=r) for r in range(4)]
    assert len({tuple(x) for x in rounds}) == 4
    assert all(Counter(x) == Counter(rounds[0]) for x in rounds)
    assert ranks.changes
    assert rounds[0] == drawn(ranks)


def test_a_list_names_every_client_or_leaves_the_others_the_rest():
    assert drawn(Listed((2, 3, 8)), 3) == [2, 3, 8]
    assert drawn(Listed({"0": 2, "3": 16}, rest=8), 5) == [2, 8, 8, 16, 8]
    assert drawn(Listed((2,), rest=4), 3) == [2, 4, 4]
    Listed((2, 3, 8)).check(3)
    Listed((2,), rest=4).check(3)
    Listed({"2": 4}, rest=1).check(3)
    Levels((2,)).check(3)
    with pytest.raises(ValueError, match=r"^client 3 is not listed, and there is no rest"):
        Listed((2, 3, 8)).of(3, 4, 0, 0)


def test_a_list_that_does_not_fit_the_clients_is_refused():
    with pytest.raises(ConfigError, match=r"^ranks.by_client: names client 3; there are 3, numbered from 0"):
        Listed({"3": 4}, rest=1).check(3)
    with pytest.raises(ConfigError, match=r"^ranks.by_client: has no rank for client 1, and names 2 of 4; want all"):
        Listed({"0": 2, "2": 4}).check(4)
    with pytest.raises(ConfigError, match=r"^ranks.by_client: has no rank for client 2, and names 2 of 3; want all"):
        Listed((2, 4)).check(3)


def test_a_policy_names_its_ranks_by_their_keys():
    assert Levels((2, 4)).named == {"levels": (2, 4)}
    assert Memory((2, 4)).named == {"levels": (2, 4)}
    assert Listed((2, 4)).named == {"by_client": (2, 4), "rest": ()}
    assert Listed({"0": 3}, rest=5).named == {"by_client": (3,), "rest": (5,)}
    assert Column().named == {}


@pytest.mark.parametrize("ranks", [Column(), Memory((2, 4))])
def test_clients_say_some_ranks_themselves(ranks):
    assert (ranks.is_said, ranks.is_whole, ranks.changes) == (True, False, False)
    with pytest.raises(ValueError, match=r"^each client says its own rank"):
        ranks.of(0, 1, 0, 0)
    assert not Levels((2,)).is_said
    assert not Listed((2,)).is_said


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Levels(()), "levels: got none; want at least one rank"),
        (lambda: Levels((2, 0)), "levels: got 0; want ranks of at least 1"),
        (lambda: Levels((2, 4), (1.0,)), "shares: got 1; want 2, one for each of levels"),
        (lambda: Levels((2, 4), (1.0, -0.5)), "shares: got 1, -0.5; want 0 or more, and not all 0"),
        (lambda: Levels((2, 4), (0.0, 0.0)), "shares: got 0, 0; want 0 or more, and not all 0"),
        (lambda: Levels((2, 4), (1.0, float("inf"))), "shares: got 1, inf; want"),
        (lambda: Levels((2, 4), (1.0, float("nan"))), "shares: got 1, nan; want"),
        (lambda: Listed((2, 0)), "by_client: got 0; want ranks of at least 1"),
        (lambda: Listed((2,), rest=0), "rest: got 0; want ranks of at least 1"),
        (lambda: Listed({"a": 2}), "by_client: got a = 2; want a client's number and its rank"),
        (lambda: Listed({"-1": 2}), "by_client: got -1 = 2; want a client's number and its rank"),
        (lambda: Listed({"1": "2"}), "by_client: got 1 = '2'; want a client's number and its rank"),
        (lambda: Listed({"1": True}), "by_client: got 1 = True; want a client's number and its rank"),
        (lambda: Column(" "), "column: got ' '; want the name of a column of the data"),
        (lambda: Memory(), "levels: got none; want the ranks to choose from"),
        (lambda: Memory((4, 0)), "levels: got 0; want ranks of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        make()
