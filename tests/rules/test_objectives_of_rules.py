"""What an objective asks of the factors that it penalises."""

import pytest

from fedpeft.rules import Objective


def test_without_a_penalty_no_tail_is_penalised_and_nothing_need_be_trained():
    assert Objective(0.0, {"q": 2}).tails(()) == {}


def test_penalised_tails_are_those_of_the_cuts():
    assert Objective(0.5, {"q": 2, "v": 0}).tails(("v/a", "q/a", "q/b", "v/b")) == {"q": 2, "v": 0}
    assert Objective(-0.5, {"q": 1}).tails(("q/a", "q/b")) == {"q": 1}


@pytest.mark.parametrize("lacking", ["q/a", "q/b", "v/a", "v/b"])
def test_a_penalty_wants_both_factors_of_each_layer_trained(lacking):
    trained = {"q/a", "q/b", "v/a", "v/b"} - {lacking}
    with pytest.raises(ValueError) as raised:  # noqa: PT011  # the whole text is compared
        Objective(0.5, {"q": 2, "v": 3}).tails(trained)
    want = f"a penalty on {lacking}, which is not trained; want both factors trained, or no penalty"
    assert str(raised.value) == want
