"""The most memory that a process has taken so far, as the system itself has counted it; no torch is imported."""

import resource
import sys
from multiprocessing import active_children
from pathlib import Path

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which getrusage counts a process's memory: macOS in bytes, others in KiB."""


def peak() -> int:
    """Bytes of this process that were in memory at once at most, since its program was started.

    On Linux the kernel's VmHWM: getrusage's number would be that of the process that started this one, where that was
    larger (its peak outlives ``exec``).
    """
    found = peak_of("self")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT if found is None else found


def workers() -> list[int]:
    """The same for each process that this one has started by ``multiprocessing`` and that is still there.

    Where the system does not say it of other processes, as on macOS, none.
    """
    numbers = sorted(x.pid for x in active_children() if x.pid is not None)
    return [found for number in numbers if (found := peak_of(number)) is not None]


def peak_of(process: int | str) -> int | None:
    """VmHWM of a process by its number, in bytes; None where there is no such process, or no such file."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf8").splitlines()
    except OSError:
        return None
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM:")), None)


def gpu_peak() -> int | None:
    """Bytes that torch had allocated at once at most on GPUs, of all that it uses; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count())))
