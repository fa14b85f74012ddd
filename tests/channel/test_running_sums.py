"""A running sum: a monoid in place."""

import numpy as np
import pytest

from fedpeft.channel import Running


def test_a_merged_sum_is_the_sum_of_both_and_leaves_the_other_alone():
    x, y = np.array([1.0, -2.0, 4.0]), np.array([8.0, 16.0, -32.0])
    left, right = Running(3).add(x).add(x), Running(3).add(y)
    assert left.merge(right) is left
    np.testing.assert_array_equal(left.total, 2 * x + y)
    assert left.count == 3
    np.testing.assert_array_equal(right.total, y)
    assert right.count == 1
    np.testing.assert_array_equal(left.merge(Running(3)).total, 2 * x + y)


def test_a_sum_leaves_its_terms_alone_and_starts_at_zero():
    x = np.ones(3)
    total = Running(3)
    np.testing.assert_array_equal(total.total, np.zeros(3))
    assert total.count == 0
    assert total.add(x) is total
    total.add(x)
    np.testing.assert_array_equal(x, np.ones(3))


@pytest.mark.parametrize("shape", [(2,), (4,), (1,), (3, 1), ()])
def test_a_sum_refuses_another_shape(shape):
    total = Running(3)
    with pytest.raises(ValueError, match=r"a sum of vectors of shape \(3,\) can't take one of"):
        total.add(np.ones(shape))
    with pytest.raises(ValueError, match="can't take"):
        total.merge(Running(4))
    np.testing.assert_array_equal(total.total, np.zeros(3))
    assert total.count == 0
