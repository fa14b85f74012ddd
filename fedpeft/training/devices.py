"""Where and in what precision a model runs."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from fedpeft.errors import ConfigError
from fedpeft.training.kernels import Attention, Shape, fast_in_bf16, summary


@dataclass(frozen=True, slots=True)
class Place:
    """A device, and the precision of the base's arithmetic there.

    In bf16 the frozen base is stored in bf16 and runs under autocast; adapters, heads, losses and
    optimisers stay in fp32. attention: the kernel to load models with; "auto" is the one that is faster for the model
    (see ``kernels``).
    """

    device: torch.device
    dtype: torch.dtype
    attention: Attention | Literal["auto"] = "auto"

    def arithmetic(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """A context in which torch draws from this seed, and after which its own state is as before."""
        accelerated = self.device.type != "cpu"
        devices = [self.device.index or 0] if accelerated else []
        with torch.random.fork_rng(devices, device_type=self.device.type if accelerated else "cuda"):
            torch.manual_seed(seed)
            yield


def choose(
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fastest"] = "auto",
    attention: Attention | Literal["auto"] = "auto",
    shape: Shape | None = None,
) -> Place:
    """The place for these settings; ConfigError names the key where this machine does not have it.

    device "auto": cuda, else mps, else cpu. precision "auto": bf16 on a cuda device that has it, fp32
    everywhere else. A CPU stays in fp32 even where its bf16 products are fast, because results in fp32
    agree between machines to rounding. "fastest": bf16 on a CPU too, where it is measured to be clearly faster for a
    model of this shape.
    """
    found = _device(device)
    if precision == "bf16" and found.type == "mps":
        raise ConfigError("training.precision: got bf16 on device mps; want fp32, auto or fastest there")
    half = precision == "bf16"
    if precision in ("auto", "fastest") and found.type == "cuda":
        half = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "fastest" and found.type == "cpu":
        half = shape is not None and fast_in_bf16(found, shape)
    return Place(found, torch.bfloat16 if half else torch.float32, attention)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"training.device: got {name!r}; want auto, cpu, cuda, cuda:1 or mps") from error
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not has.get(device.type, False):
        here = ", ".join(n for n, x in has.items() if x)
        raise ConfigError(f"training.device: got {name!r}, which this machine does not have; it has {here}")
    return device


def measure(side: int = 1024, repeats: int = 4) -> dict[str, object]:
    """What torch runs on here: threads, devices, measured rates of a square matrix product in GFLOP/s, and
    which kernels are faster."""
    place = choose()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return {
        "device": str(place.device),
        "precision": names[place.dtype],
        "threads": torch.get_num_threads(),
        "gflops": {name: round(_rate(place.device, dtype, side, repeats), 1) for dtype, name in names.items()},
        "faster here": summary(place.device),
    }


def _rate(device: torch.device, dtype: torch.dtype, side: int, repeats: int) -> float:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(side, side, generator=generator).to(device, dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9
