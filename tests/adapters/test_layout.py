"""Named tensors as one flat vector, and back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import Layout

LAYOUT = Layout((("w", (2, 3)), ("s", ()), ("v", (4,)), ("none", (0, 5))))
TENSORS = {
    "v": np.array([-7.0, 8.0, -9.0, 10.0]),
    "none": np.zeros((0, 5)),
    "w": np.array([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]]),
    "s": np.array(0.5),
}


def test_a_vector_holds_the_tensors_in_the_layouts_order():
    assert LAYOUT.size == 11
    np.testing.assert_array_equal(LAYOUT.flatten(TENSORS), [1, -2, 3, -4, 5, -6, 0.5, -7, 8, -9, 10])


def test_unflatten_is_the_inverse_of_flatten_without_a_copy():
    vector = LAYOUT.flatten(TENSORS)
    back = LAYOUT.unflatten(vector)
    assert list(back) == ["w", "s", "v", "none"]
    for name, x in back.items():
        np.testing.assert_array_equal(x, TENSORS[name])
        assert x.size == 0 or np.shares_memory(x, vector)


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=5))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_any_layout_goes_there_and_back(shapes):
    layout = Layout(tuple((str(i), shape) for i, shape in enumerate(shapes)))
    vector = np.arange(float(layout.size))
    np.testing.assert_array_equal(layout.flatten(layout.unflatten(vector)), vector)


def test_an_empty_layout_has_an_empty_vector():
    assert Layout(()).size == 0
    assert Layout(()).flatten({}).shape == (0,)
    assert Layout(()).unflatten(np.zeros(0)) == {}


def test_layouts_add_up_in_order():
    assert Layout((("a", (2,)),)) + Layout((("b", (3,)),)) == Layout((("a", (2,)), ("b", (3,))))


def test_a_flat_vector_is_a_copy():
    x = np.ones(3)
    Layout((("x", (3,)),)).flatten({"x": x})[0] = 5
    np.testing.assert_array_equal(x, np.ones(3))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": (2, 3)}, "do not fit the layout: missing: s, v$"),
        ({"w": (2, 3), "s": (), "v": (4,), "x": (1,)}, "do not fit the layout: not wanted: x$"),
        ({"w": (3, 2), "s": (), "v": (4,)}, r"do not fit the layout: wrong shape: w is \(3, 2\), want \(2, 3\)$"),
        ({"w": (6,), "v": (4,), "y": ()}, r"missing: s; not wanted: y; wrong shape: w is \(6,\), want \(2, 3\)$"),
        ({"w": (2, 3), "s": (), "v": (4,), "1": (), "2": (), "3": ()}, "not wanted: 1, 2, 3$"),
        ({"w": (2, 3), "s": (), "v": (4,), "1": (), "2": (), "3": (), "4": ()}, "not wanted: 1, 2, 3 …$"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors, message):
    layout = Layout((("w", (2, 3)), ("s", ()), ("v", (4,))))
    with pytest.raises(ValueError, match=message):
        layout.flatten({n: np.zeros(shape) for n, shape in tensors.items()})


@pytest.mark.parametrize("shape", [(10,), (12,), (11, 1), (1, 11), ()])
def test_a_vector_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"vector does not fit the layout: got .*; want \(11,\)"):
        LAYOUT.unflatten(np.zeros(shape))


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ValueError, match=r"got twice: \['x', 'z'\]"):
        Layout((("z", (1,)), ("x", (1,)), ("y", (1,)), ("x", (2,)), ("z", (1,))))
