"""Reports are drawn in the files of this room that look at them: they take nine tenths of a small run's time."""

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _reports_where_they_are_read(request: pytest.FixtureRequest) -> Iterator[None]:
    if "report.html" in inspect.getsource(request.module):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            import_module("fedpeft.run.simulate"), "write_report", lambda folder: Path(folder) / "report.html"
        )
        yield
