"""What a client agrees to: the good case, each refusal with its code and words, and both sides of every bound."""

import math
from dataclasses import replace

import pytest

from fedpeft.channel import ring
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.params import Params, hash_models
from fedpeft.secagg.policy import MOST_HALVINGS, Expected, History, Policy, check, slice_is_safe
from fedpeft.secagg.protocol import Refused
from fedpeft.secagg.roster import Member, Roster

N = 12
PEOPLE = tuple(sorted(Identity.of(bytes([9 + i]) * 32).id for i in range(N + 1)))
COHORT, STRANGER = PEOPLE[:N], PEOPLE[N]
ME = COHORT[5]
RANKS = (4, 4, 4, 4, 8, 8, 8, 16, 16, 16, 16, 16)  # mine is 8: 8 clients add to its last slice, 3 receive its model
MODELS = {"4": "44" * 32, "8": "88" * 32, "16": "ff" * 32}
ROSTER = Roster(tuple(Member(x, "", 8 if x == ME else None) for x in COHORT), helper=bytes(range(32)))
EXPECTED = Expected("11" * 32, (120, 33), "4", "0.5", 20, "1000", 8, "minilm", 32)
GOOD = Params(
    v=1,
    suite="full",
    consistency=True,
    run_id="run-7",
    fl_round=3,
    attempt=0,
    session="0123456789abcdef" * 2,
    n=N,
    t=9,
    k=11,
    m=32,
    bits=20,
    range="4",
    clip="0.5",
    dims=(120, 33),
    layout_hash="11" * 32,
    model_hash=hash_models(MODELS).hex(),
    models=MODELS,
    base="minilm",
    weighting="1000",
    cohort=tuple(x.hex() for x in COHORT),
    ranks=RANKS,
)
KREGULAR = {"suite": "kregular", "k": 8, "t": 6}
TWO = {"suite": "twoserver", "k": 0, "t": 8, "consistency": False}
HIDDEN = {"ranks": (), "models": {"0": "ab" * 32}, "model_hash": hash_models({"0": "ab" * 32}).hex()}


def agree(params=None, policy=None, history=None, expected=None, roster=ROSTER, me=ME):
    """Check the good case with changes; None where the client agrees."""
    check(
        Params.from_json(replace(GOOD, **(params or {})).to_json()),
        me,
        roster,
        replace(Policy(), **(policy or {})),
        replace(History(), **(history or {})),
        replace(EXPECTED, **(expected or {})),
    )


def ids(*people):
    return {"cohort": tuple(x.hex() for x in people), "n": len(people)}


def ranked(*ranks, models=MODELS):
    return {"ranks": ranks, "models": models, "model_hash": hash_models(models).hex()}


def test_a_client_agrees_to_what_it_wants():
    agree()


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": {"min_cohort": 12}},
        {"params": {"t": 12}},
        {"params": KREGULAR},
        {"params": KREGULAR | {"t": 9}},
        {"params": KREGULAR | {"k": 6, "t": 5}},
        {"params": KREGULAR | {"k": 11, "t": 9}},
        {"params": TWO},
        {"params": TWO | {"t": 12}},
        {"params": {"suite": "mock", "k": 0, "t": 1}, "policy": {"suites": ("mock",)}},
        {"params": {"consistency": False}, "policy": {"consistency": False}},
        {"params": {"t": 7}, "policy": {"min_threshold": 0.5}},
        {"params": {"bits": 28}, "expected": {"bits": None}},
        {"params": {"m": 24, "bits": 20}, "expected": {"m": 24}},
        {"params": {"m": 16, "bits": 12}, "expected": {"m": None, "bits": 12}},
        {"params": {"range": "4.0", "clip": "0.50", "weighting": "1000.000"}},
        {"params": {"clip": ""}, "expected": {"clip": ""}},
        {"policy": {"largest_range": 4.0}},
        {"policy": {"layouts": ("22" * 32, "11" * 32), "bases": ("x", "minilm")}},
        {"params": {"dp": {"noise_multiplier": "1.1"}}, "policy": {"min_noise": "1.1"}},
        {"params": {"dp": {"noise_multiplier": "10"}}, "policy": {"min_noise": "9.5"}},
        {"params": {"halvings": ((0, 30), (30,))}, "expected": {"leaves": (2, 1)}},
        {"expected": {"leaves": (2, 1)}},
        {"params": HIDDEN, "expected": {"rank": None}},
        {"params": HIDDEN, "expected": {"rank": None}, "policy": {"min_slice": 12}},
        {"params": ranked(*[4] * 9, 8, 8, 8), "expected": {"rank": 4}},
        {"expected": {"rank": 9}},
        {"policy": {"min_slice": 8, "min_alike": 3}},
        {"params": HIDDEN | {"models": MODELS, "model_hash": hash_models(MODELS).hex()}, "expected": {"rank": None}},
        {"params": HIDDEN, "expected": {"rank": None}, "policy": {"min_alike": 12}},
        {"params": ranked(*RANKS, models=dict.fromkeys(MODELS, "aa" * 32)), "policy": {"min_alike": 12}},
        {"history": {"sessions": {"00" * 16}, "last_round": 2, "rounds": 2}, "policy": {"max_rounds": 3}},
        {"params": {"fl_round": 0}},
    ],
)
def test_a_client_agrees_up_to_each_bound(changes):
    agree(**changes)


REFUSED = [
    ("cohort", {"params": {"n": 11}}, "params.n: got 11 for a cohort of 12; want its size"),
    ("cohort", {"policy": {"min_cohort": 13}}, "got a cohort of 12; this client's policy wants 13 or more: ask more"),
    ("cohort", {"params": ids(ME)}, "got a cohort of 1; this client's policy wants 5 or more"),
    ("cohort", {"params": ids(*COHORT, ME)}, f"params.cohort: {ME.hex()} is listed twice; want each once"),
    ("cohort", {"params": ids(*COHORT[::-1])}, "params.cohort: is not in order; want ids ascending"),
    ("cohort", {"params": ids(*(x for x in COHORT if x != ME))}, f"this client, {ME.hex()}, is not in it"),
    ("roster", {"params": ids(*PEOPLE)}, f"1 are not in this client's roster, version 1: {STRANGER.hex()}; want"),
    ("version", {"params": {"v": 2}}, "params.v: got 2; want 1: install the same fedpeft"),
    ("suite", {"params": {"suite": "mock"}}, "got 'mock'; this client's policy has full, kregular, twoserver"),
    ("suite", {"params": {"suite": ""}}, "got ''; this client's policy has full"),
    ("suite", {"params": KREGULAR, "policy": {"suites": ("full",)}}, "got 'kregular'; this client's policy has full"),
    ("consistency", {"params": {"consistency": False}}, "params.consistency: got false; this client's policy wants"),
    ("consistency", {"params": KREGULAR | {"consistency": False}}, "params.consistency: got false"),
    ("degree", {"params": {"k": 10}}, "params.k: got 10 for full; want 11 to 11"),
    ("degree", {"params": {"k": 12}}, "params.k: got 12 for full; want 11 to 11"),
    ("degree", {"params": KREGULAR | {"k": 4, "t": 4}}, "params.k: got 4 for kregular; want 6 to 11"),
    ("degree", {"params": KREGULAR | {"k": 12, "t": 9}}, "params.k: got 12 for kregular; want 6 to 11"),
    ("degree", {"params": KREGULAR | {"k": 9, "t": 7}}, "params.k: got 9; want an even number, or all others"),
    ("threshold", {"params": {"t": 8}}, "params.t: got 8; this client's policy wants 9 to 12, of 12 who hold shares"),
    ("threshold", {"params": {"t": 1}}, "params.t: got 1; this client's policy wants 9 to 12"),
    ("threshold", {"params": {"t": 13}}, "params.t: got 13; this client's policy wants 9 to 12"),
    ("threshold", {"params": {"t": 6}, "policy": {"min_threshold": 0.5}}, "got 6; this client's policy wants 7 to 12"),
    ("threshold", {"params": KREGULAR | {"t": 5}}, "params.t: got 5; this client's policy wants 6 to 9, of 8 who"),
    ("threshold", {"params": KREGULAR | {"t": 10}}, "params.t: got 10; this client's policy wants 6 to 9"),
    ("threshold", {"params": KREGULAR | {"k": 11, "t": 8}}, "params.t: got 8; this client's policy wants 9 to 12"),
    ("threshold", {"params": TWO | {"t": 7}}, "params.t: got 7; want 8 to 12, of 12 clients"),
    ("threshold", {"params": TWO | {"t": 13}}, "params.t: got 13; want 8 to 12"),
    (
        "threshold",
        {"params": {"suite": "other", "k": 0, "t": 13}, "policy": {"suites": ("other",)}},
        "params.t: got 13; want at most n, 12",
    ),
    ("helper", {"params": TWO, "roster": replace(ROSTER, helper=None)}, "the roster names no helper; want its key"),
    ("ring", {"params": {"m": 20}}, "params.m: got 20; want one of 16, 24, 32"),
    ("ring", {"params": {"m": 24}}, "params.m: got 24; the run's settings want 32"),
    (
        "overflow",
        {"params": {"bits": 29}, "expected": {"bits": 29}},
        "params.bits: got 29, with which a sum of 12 may reach 3,221,225,460; Z_2^32 has room for 2,147,483,647",
    ),
    ("overflow", {"params": {"m": 16, "bits": 13}, "expected": {"m": 16, "bits": 13}}, "Z_2^16 has room for 32,767"),
    ("overflow", {"params": {"bits": 32}, "expected": {"bits": None}}, "want fewer bits"),
    ("grid", {"params": {"bits": 19}}, "params.bits: got 19; the run's settings want 20"),
    ("grid", {"params": {"range": "4.1"}}, "params.range: got '4.1'; the run's settings want '4'"),
    ("grid", {"params": {"clip": "0.6"}}, "params.clip: got '0.6'; the run's settings want '0.5'"),
    ("grid", {"params": {"clip": ""}}, "params.clip: got ''; the run's settings want '0.5'"),
    ("grid", {"expected": {"clip": ""}}, "params.clip: got '0.5'; the run's settings want ''"),
    ("grid", {"params": {"weighting": "1"}}, "params.weighting: got '1'; the run's settings want '1000'"),
    ("grid", {"params": {"range": "0"}, "expected": {"range": "0"}}, "params.range: got '0'; want more than 0"),
    ("grid", {"params": {"clip": "0.0"}, "expected": {"clip": "0"}}, "params.clip: got '0.0'; want more than 0"),
    ("grid", {"params": {"weighting": "0"}, "expected": {"weighting": "0"}}, "params.weighting: got '0'; want more"),
    ("grid", {"policy": {"largest_range": 3.9}}, "params.range: got 4; this client's policy wants at most 3.9"),
    ("layout", {"params": {"dims": ()}, "expected": {"dims": ()}}, "params.dims: got none; want the length of each"),
    ("layout", {"params": {"dims": (120,)}}, "params.dims: got 120; the rule's vectors have 120, 33"),
    ("layout", {"params": {"dims": (1,) * 9}}, "params.dims: got 1, 1, 1, 1, 1, 1, 1, 1, …; the rule's"),
    ("layout", {"params": {"layout_hash": "12" * 32}}, "got 1212121212121212; what this client would add has 1111"),
    ("layout", {"policy": {"layouts": ("22" * 32,)}}, "which is none of this client's policy.layouts"),
    *(
        ("scales", {"params": {"halvings": ks}, "expected": {"leaves": (2, 1)}}, f"got {got} in its passes; the rule's")
        for ks, got in [(((0, 1), (2, 3)), "2, 2"), (((0, 1),), "2"), (((2,), (0, 1)), "1, 2"), (((), ()), "0, 0")]
    ),
    (
        "scales",
        {"params": {"halvings": ((0, 0), (0,))}},
        "params.halvings: got 2, 1 in its passes; the rule's tensors, as",
    ),
    ("scales", {"params": {"halvings": ((0, 0),)}}, "as the run's settings scale them, are none"),
    (
        "scales",
        {"params": {"halvings": ((31, 0), (0,))}, "expected": {"leaves": (2, 1)}},
        "params.halvings: got 31; want at most 30",
    ),
    (
        "scales",
        {"params": {"halvings": ((30, 0), (1 << 30,))}, "expected": {"leaves": (2, 1)}},
        "params.halvings: got 1073741824; want at most 30",
    ),
    ("base", {"params": {"base": "other"}}, "params.base: got 'other'; the run's settings want 'minilm'"),
    ("base", {"policy": {"bases": ("gemma",)}}, "params.base: got 'minilm'; this client's policy has gemma"),
    ("noise", {"policy": {"min_noise": "0.1"}}, "got '0'; this client's policy wants 0.1 or more, as decimal text"),
    (
        "noise",
        {"params": {"dp": {"noise_multiplier": "9.9"}}, "policy": {"min_noise": "10"}},
        "params.dp.noise_multiplier: got '9.9'; this client's policy wants 10",
    ),
    ("noise", {"params": {"dp": {"noise_multiplier": "NaN"}}}, "got 'NaN'"),
    ("noise", {"params": {"dp": {"noise_multiplier": "1e9"}}}, "got '1e9'"),
    ("noise", {"params": {"dp": {"noise_multiplier": 5}}}, "got 5; this client's policy wants 0 or more"),
    ("model", {"params": {"model_hash": "11" * 32}}, "is not the digest of the 3 in params.models"),
    ("model", {"params": {"models": {}, "model_hash": hash_models({}).hex()}}, "is not the digest of the 0"),
    ("rank", {"expected": {"rank": None}}, "params.ranks: got 12; this rule hides them: want none"),
    (
        "model",
        {
            "params": HIDDEN | {"models": MODELS, "model_hash": hash_models(MODELS).hex()},
            "expected": {"rank": None},
            "policy": {"min_alike": 2},
        },
        "params.models: got 3 that differ, and ranks are hidden; this client's policy has min_alike = 2, so",
    ),
    ("rank", {"params": HIDDEN}, "params.ranks: got 0 for a cohort of 12; want one for each"),
    ("rank", {"params": {"ranks": RANKS[:-1]}}, "params.ranks: got 11 for a cohort of 12"),
    ("rank", {"params": {"ranks": (*RANKS, 4)}}, "params.ranks: got 13 for a cohort of 12"),
    ("rank", {"expected": {"rank": 7}}, "params.ranks: this client's is said to be 8; it is 7: want at most that"),
    ("rank", {"params": {"ranks": (0, *RANKS[1:])}}, f"params.ranks: got 0 for {COHORT[0].hex()}; want 1 to any"),
    (
        "rank",
        {"params": {"ranks": (*RANKS[:5], 9, *RANKS[6:])}, "expected": {"rank": 9}},
        f"params.ranks: got 9 for {ME.hex()}; want 1 to 8, its cap in the roster",
    ),
    (
        "rank",
        {"roster": Roster(tuple(Member(x, "", 15) for x in COHORT))},
        f"params.ranks: got 16 for {COHORT[7].hex()}; want 1 to 15",
    ),
    ("model", {"params": {"ranks": (*RANKS[:-1], 32)}}, "params.models: has none for rank 32"),
    (
        "slice",
        {"params": ranked(*(4,) * 5, 8, *(4,) * 5, 8)},
        "params.ranks: 2 clients have rank 8 or more; this client's policy wants 3, since fewer would show",
    ),
    (
        "slice",
        {"policy": {"min_slice": 9}},
        "params.ranks: 8 clients have rank 8 or more; this client's policy wants 9",
    ),
    (
        "slice",
        {"params": ranked(*(4,) * 5, 8, *(4,) * 6)},
        "1 clients have rank 8 or more",
    ),
    ("model", {"policy": {"min_alike": 4}}, "params.models: 3 clients receive the same as this one, of rank 8; this"),
    ("replay", {"history": {"sessions": {GOOD.session}}}, f"params.session: {GOOD.session} was used before; want a"),
    ("round", {"history": {"last_round": 3}}, "params.fl_round: got 3; round 3 of this run is done: want a later one"),
    ("round", {"history": {"last_round": 7}}, "params.fl_round: got 3; round 7 of this run is done"),
    (
        "budget",
        {"history": {"rounds": 3}, "policy": {"max_rounds": 3}},
        "has taken part in 3 rounds of this run; its policy has max_rounds = 3",
    ),
]


@pytest.mark.parametrize(
    ("code", "changes", "message"), REFUSED, ids=[f"{c}-{i}" for i, (c, _, _) in enumerate(REFUSED)]
)
def test_a_client_refuses_with_a_code_and_the_reason(code, changes, message):
    with pytest.raises(Refused) as error:
        agree(**changes)
    assert error.value.code == code
    assert message in str(error.value)
    assert str(error.value).startswith("params.")
    assert error.value.culprit is None


def test_halvings_are_bounded_as_a_grid_bounds_them():
    assert MOST_HALVINGS == ring.MOST_HALVINGS


def test_every_code_is_a_short_word_that_says_nothing_secret():
    codes = {code for code, _, _ in REFUSED}
    assert all(x.isalpha() and x.islower() and len(x) <= 12 for x in codes)


@pytest.mark.parametrize("n", [5, 6, 7, 9, 12, 20, 21, 100, 300, 999, 1000])
def test_the_threshold_is_more_than_two_thirds_and_the_floor_what_dropouts_leave(n):
    assert Policy().least_threshold(n) == (2 * n) // 3 + 1
    assert Policy().fewest(n) == max(5, -(-6 * n // 10))
    assert Policy(min_threshold=0.5).least_threshold(n) == n // 2 + 1
    assert Policy(max_dropout=0.3).fewest(n) == max(5, -(-7 * n // 10))  # and not one more for what 0.3 is in floats
    assert Policy(max_dropout=0.0).fewest(n) == max(5, n)
    assert Policy(min_cohort=50).fewest(n) == max(50, -(-6 * n // 10))


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        ("min_cohort", 2, "3 or more: of two, each learns the other's"),
        ("min_threshold", 0.0, "more than 0 and less than 1"),
        ("min_threshold", 1.0, "more than 0 and less than 1"),
        ("min_threshold", math.nan, "more than 0 and less than 1"),
        ("max_dropout", -0.1, "0 or more and less than 1"),
        ("max_dropout", 1.0, "0 or more and less than 1"),
        ("min_slice", 0, "1 or more"),
        ("suites", (), "at least one, of full, kregular, twoserver or another package's"),
        ("max_rounds", 0, "1 or more"),
        ("largest_range", 0.0, "more than 0"),
        ("largest_range", math.inf, "more than 0"),
        ("min_noise", "-1", "a decimal string that is not negative"),
        ("min_noise", "some", "a decimal string"),
        ("min_degree", 0, "1 or more"),
        ("min_alike", 0, "1 or more"),
    ],
)
def test_a_policy_that_makes_no_sense_is_not_made(key, value, want):
    with pytest.raises(ValueError, match=rf"^{key}: got ") as error:
        Policy(**{key: value})
    assert f"; want {want}" in str(error.value)


def test_a_policy_is_as_strict_by_default_as_the_specification_says():
    policy = Policy()
    assert (policy.min_cohort, policy.min_threshold, policy.max_dropout, policy.min_slice) == (5, 2 / 3, 0.4, 3)
    assert policy.suites == ("full", "kregular", "twoserver")
    assert policy.consistency is True
    assert (policy.max_rounds, policy.largest_range, policy.bases, policy.layouts) == (None, None, (), ())
    assert (policy.min_noise, policy.min_degree, policy.min_alike) == ("0", 6, 1)


SAME = replace(GOOD, **ranked(*RANKS, models=dict.fromkeys(MODELS, "aa" * 32)))


def test_survivors_are_enough_where_three_have_my_rank_or_more():
    mine = {ME, COHORT[7], COHORT[11]}
    assert slice_is_safe(SAME, COHORT, ME, Policy())
    assert slice_is_safe(SAME, mine, ME, Policy())
    assert slice_is_safe(SAME, mine | set(COHORT[:4]), ME, Policy())
    assert not slice_is_safe(SAME, mine - {COHORT[7]} | set(COHORT[:4]), ME, Policy())
    assert slice_is_safe(SAME, mine - {COHORT[7]} | set(COHORT[:4]), ME, Policy(min_slice=2))
    assert slice_is_safe(SAME, mine - {COHORT[7]} | set(COHORT[:4]), COHORT[0], Policy(min_slice=6))
    assert not slice_is_safe(SAME, mine - {COHORT[7]} | set(COHORT[:4]), COHORT[0], Policy(min_slice=7))


def test_survivors_are_too_few_where_others_were_sent_another_model():
    left = set(COHORT) - {COHORT[4]}  # 7 of my rank or more, 2 of them with my model
    assert slice_is_safe(GOOD, COHORT, ME, Policy(min_alike=3))
    assert not slice_is_safe(GOOD, left, ME, Policy(min_alike=3))
    assert slice_is_safe(GOOD, left, COHORT[7], Policy(min_alike=3))
    assert slice_is_safe(GOOD, left, ME, Policy(min_alike=2))
    assert slice_is_safe(GOOD, left, ME, Policy())


def test_survivors_of_hidden_ranks_are_all_alike():
    hidden = replace(GOOD, **HIDDEN)
    assert slice_is_safe(hidden, COHORT[3:6], ME, Policy())
    assert not slice_is_safe(hidden, COHORT[4:6], ME, Policy())
    assert slice_is_safe(hidden, COHORT[3:6], ME, Policy(min_alike=3))
    assert not slice_is_safe(hidden, COHORT[3:6], ME, Policy(min_alike=4))
