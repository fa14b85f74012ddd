"""Reports are drawn for the tests of this room that look at them: they take nine tenths of a small run's time."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

import pytest


@contextmanager
def _undrawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        there = import_module("fedpeft.run.simulate")
        patch.setattr(there, "write_report", lambda folder: Path(folder) / "report.html")
        yield


def _as_read(what: object) -> AbstractContextManager[None]:
    """A context with reports drawn if this module or function speaks of them, and else without."""
    return nullcontext() if "report.html" in inspect.getsource(what) else _undrawn()  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def _reports_of_fixtures(request: pytest.FixtureRequest) -> Iterator[None]:
    with _as_read(request.module):
        yield


@pytest.fixture(autouse=True)
def _reports_of_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    with _as_read(request.function):
        yield
