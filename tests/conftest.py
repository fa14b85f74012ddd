"""The tests' surroundings: no network, quiet threads; tests whose asset this machine lacks are skipped with the reason.

With FEDPEFT_ASSETS=required, as in CI, a missing asset fails them.
"""

import os
import sys
from collections.abc import Generator

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from fedpeft.errors import ConfigError, DataError
from fedpeft.training.environment import prepare

prepare()
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # not for peft: see fedpeft.training.environment


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    try:
        return (yield)
    except (ConfigError, DataError) as error:
        lacks = "apt-get install" in str(error) or "pip install --no-deps" in str(error)
        if lacks and os.environ.get("FEDPEFT_ASSETS") != "required":
            pytest.skip(f"an asset is not on this machine: {error}")
        raise
