"""The process's surroundings: threads, allocator and cache folder; set before torch is imported."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MIB = 1 << 20
# glibc's parameter numbers (malloc.h): keep freed memory, and take blocks up to 8 MiB from the heap, so that each
# step's activations reuse the last step's pages instead of faulting in fresh ones. Larger blocks are mapped and
# given back: kept in the heap they leave holes that raised the peak of a step of 64 x 128 tokens of MiniLM
# from 960 to 1,650 MB (380 to 1,160 MB with checkpointing), and saved no time that could be measured.
_ALLOCATOR = (
    ("MALLOC_TRIM_THRESHOLD_", -1, 1024 * _MIB),
    ("MALLOC_TOP_PAD_", -2, 64 * _MIB),
    ("MALLOC_MMAP_THRESHOLD_", -3, 8 * _MIB),
)
_SPARING = 64 << 10  # bytes, of all three: a text of 128 tokens has keys and values of 100 kB a layer
_IS_SPARING = "FEDPEFT_SPARING"  # the variable that tells this process, and those that it starts
_NOT_THEIRS = ("bitsandbytes",)
"""What peft and transformers must not find in any process: of it we use a kernel, where that is asked for, and its
import takes seconds and 45 MB."""

_UNUSED = (*_NOT_THEIRS, "pandas", "scipy", "sklearn", "torchao", "torchvision")
"""Packages that transformers and peft import where they are installed, and that nothing here needs of them."""

_VARIABLES = (
    ("OMP_WAIT_POLICY", "PASSIVE"),  # spinning threads cost more than anything else when processes share cores
    ("TOKENIZERS_PARALLELISM", "false"),
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
)


SETTINGS = (*(n for n, _ in _VARIABLES), *(n for n, _, _ in _ALLOCATOR))
"""The environment's variables that ``prepare`` sets."""


def prepare(threads: int | None = None) -> bool:
    """Apply the thread, allocator and telemetry settings to this process and the ones that it starts.

    Call it first thing in an entry point. Variables that the user has set are left as they are. True if
    all of it takes effect; False if torch was imported already, so that its threads may still spin.
    """
    in_time = "torch" not in sys.modules or os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    for name, value in _VARIABLES:
        os.environ.setdefault(name, value)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
    _allocate()
    return in_time


@contextmanager
def starting() -> Iterator[None]:
    """A context for imports and other first work, in which Python's cycle collector rests: a quarter of the start.

    Imports make half a million objects of which none is garbage, and the collector looks through them again and again;
    what there is at the end it never looks at again. Once torch is imported that is left out, so that no model is kept
    for good by being there at its end. peft and transformers find no bitsandbytes here, nor later in this process; in
    one that is ``sparing`` they find none of the packages that they import and that nothing needs.
    """
    is_first, spares = "torch" not in sys.modules, bool(os.environ.get(_IS_SPARING))
    rests = is_first and not spares and gc.isenabled()
    hidden = _UNUSED if is_first and spares else _NOT_THEIRS
    if rests:
        gc.disable()
    try:
        with without([x for x in hidden if x not in sys.modules]):
            yield
            _ask_once()
    finally:
        if rests:
            gc.freeze()
            gc.enable()


def _ask_once() -> None:
    """Have peft and transformers find out now what is installed: they keep the answer, and go by it in all they do.

    A version that has no such question is not asked: it may then load what it finds, which costs memory and no more.
    """
    for module, questions in (
        ("peft.import_utils", ("is_bnb_available", "is_bnb_4bit_available")),
        ("transformers.utils.import_utils", ("is_bitsandbytes_available",)),
    ):
        if module in sys.modules:
            for question in questions:
                getattr(sys.modules[module], question, bool)()


@contextmanager
def without(packages: Sequence[str]) -> Iterator[None]:
    """A context in which these packages, of which none has been imported, seem not to be installed."""
    hidden: dict[str, Any] = dict.fromkeys(packages)  # None is how Python itself notes that there is no such module
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in packages:
            if name in sys.modules and sys.modules[name] is None:
                del sys.modules[name]


@contextmanager
def showing(package: str) -> Iterator[None]:
    """A context in which a package can be imported, even if ``without`` hides it."""
    hides = package in sys.modules and sys.modules[package] is None
    if hides:
        del sys.modules[package]
    try:
        yield
    finally:
        if hides and package not in sys.modules:
            sys.modules.update({package: None})  # type: ignore[dict-item]  # as in ``without``


def _allocate() -> None:
    """glibc reads its variables when a process starts: set them for children, and mallopt for this one."""
    for name, number, value in _ALLOCATOR:
        if name in os.environ:
            continue
        allocator({number: value})
        os.environ[name] = str(value)


def sparing() -> None:
    """Have glibc give back at once what is freed, in this process and those that it starts: for a device's memory.

    Without it a step's freed tensors stay in the heap, in holes that others do not fit: the peak of what training adds
    was 1.7 times as high. Blocks of 64 KiB and more are then mapped one by one, which takes a few per cent of time.
    Elsewhere than on Linux with glibc nothing of this happens. ``starting`` then leaves out packages of others that
    are installed and not needed (60 MB for scipy and bitsandbytes), and lets the cycle collector work (30 MB).
    """
    os.environ[_IS_SPARING] = "1"
    for name, number, _ in _ALLOCATOR:
        allocator({number: _SPARING})
        os.environ[name] = str(_SPARING)


def allocator(settings: Mapping[int, int]) -> None:
    """Set glibc's parameters, by their numbers (malloc.h), for this process; where there is no glibc, nothing."""
    if _has_glibc():
        for number, value in settings.items():
            ctypes.CDLL(None).mallopt(number, value)


def give_back() -> None:
    """Return memory that was freed to the system, where glibc keeps it for later: after a model has been packed."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def cache_folder() -> Path:
    """Where converted models and digests are kept: $FEDPEFT_CACHE, or ~/.cache/fedpeft."""
    return Path(os.environ.get("FEDPEFT_CACHE") or Path.home() / ".cache" / "fedpeft")


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None if it isn't installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def memory() -> dict[str, int]:
    """The machine's "total" and "available" memory in bytes; the total for both where the system says no more."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
        return {"total": kilobytes["MemTotal"] * 1024, "available": kilobytes["MemAvailable"] * 1024}
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return {"total": total, "available": total}
