"""Sums of what clients say of their training."""

from math import isnan

import numpy as np

from fedpeft.rounds import Metrics

X, Y = Metrics(3.0, 4.0, 1.0, 2.0), Metrics(-0.5, 8.0, 7.0, 16.0)


def test_metrics_add_up_field_by_field():
    assert Metrics(2.5, 12.0, 8.0, 18.0) == X + Y
    assert X + Metrics() == X


def test_a_vector_holds_the_fields_in_order_and_goes_back():
    np.testing.assert_array_equal(X.vector(), [3.0, 4.0, 1.0, 2.0])
    assert Metrics.of(Y.vector()) == Y
    assert all(type(v) is float for v in Metrics.of(np.array([1, 2, 3, 4], np.float32)).vector().tolist())
    np.testing.assert_array_equal((X + Y).vector(), X.vector() + Y.vector())


def test_means_are_per_unit():
    assert X.mean_loss == 0.75
    assert X.accuracy == 0.25
    assert (X + Y).accuracy == 8 / 12


def test_nothing_predicted_has_no_mean():
    assert isnan(Metrics().mean_loss)
    assert isnan(Metrics(examples=3.0).accuracy)
