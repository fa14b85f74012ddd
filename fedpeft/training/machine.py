"""What this machine has and can do, and which models are here, for ``fedpeft doctor``."""

import os
import platform

from fedpeft.training.environment import SETTINGS, cache_folder, cores, memory, version


def facts() -> dict[str, object]:
    """What this machine has and can do, for ``fedpeft doctor``: JSON-able; memory in bytes, rates in GFLOP/s.

    Takes a second or two where torch is installed: it imports it and measures matrix products.
    """
    found: dict[str, object] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cores(),
        "memory": memory(),
        "versions": {n: version(n) for n in ("fedpeft", "torch", "transformers", "peft", "flwr", "numpy")},
        "cache": str(cache_folder()),
        "environment": {n: os.environ.get(n) for n in SETTINGS},
    }
    if version("torch") is not None:
        from fedpeft.training.devices import measure

        found |= measure()
    return found


def models() -> dict[str, str]:
    """For each packaged model, "ready", or what to do to get it."""
    from fedpeft.training.packaged import presence

    return presence()
