"""Which of two ways to compute the same is faster on this machine: measured once for a model's sizes, and kept."""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from fedpeft.training.cache import keep
from fedpeft.training.environment import cache_folder

Attention: TypeAlias = Literal["eager", "sdpa"]
Seconds: TypeAlias = dict[str, float]

CLEARLY = 1.2
"""How many times faster than the default the other way has to be: less may be noise, on which no choice may hang."""

_FORMAT = 1  # of what is measured: raise it when that changes
_LEAST, _ROUNDS = 3, 7  # the best of so many, after one to warm up
_SECONDS = 0.25  # after which, with the least done, no further round is begun
_TOKENS = 1024  # in a step
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "bf16", "asimd", "sve", "sve2")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model that decide which kernel is fast: attention heads and the size of each, the model's width
    and the inner width of its feed-forward layers, and tokens of a row."""

    heads: int
    size: int
    width: int
    inner: int
    length: int

    @classmethod
    def of(cls, config: Any, length: int = 128) -> Self | None:
        """From a transformers configuration; None where it does not say. Images have as many tokens as patches, and
        one."""
        heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
        if not isinstance(heads, int) or not isinstance(width, int):
            return None
        side, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
        if isinstance(side, int) and isinstance(patch, int):
            length = (side // patch) ** 2 + 1
        size = getattr(config, "head_dim", None) or width // heads
        return cls(heads, size, width, getattr(config, "intermediate_size", None) or 4 * width, length)


def fastest_attention(device: torch.device, dtype: torch.dtype, shape: Shape) -> Attention:
    """What attention is faster in, forward and backward: "sdpa", torch's fused one, or "eager", plain matrix products.

    The default is sdpa, but on a CPU in bf16 eager; the other one is chosen where it is clearly faster.
    """
    found = seconds("attention", device, dtype, shape)
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "sdpa" if found["eager"] > CLEARLY * found["sdpa"] else "eager"
    return "eager" if found["sdpa"] > CLEARLY * found["eager"] else "sdpa"


def fast_in_bf16(device: torch.device, shape: Shape) -> bool:
    """Whether linear layers of these sizes are clearly faster in bf16 than in fp32, forward and backward."""
    found = seconds("linear", device, torch.bfloat16, shape)
    return found["fp32"] > CLEARLY * found["bf16"]


def seconds(what: Literal["attention", "linear"], device: torch.device, dtype: torch.dtype, shape: Shape) -> Seconds:
    """The time that each way takes for a step's worth of tokens, by name: "eager" and "sdpa", or "fp32" and "bf16".

    Measured in about half a second, and kept in the cache folder for this processor, its threads, this torch and these
    sizes: of processes that measure at once the first one's figures hold for all, so that all choose alike.
    """
    facts = {"what": what, "dtype": str(dtype), "shape": asdict(shape), "machine": machine(device), "format": _FORMAT}
    file = folder() / (sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32] + ".json")
    names = ("sdpa", "eager") if what == "attention" else ("fp32", "bf16")
    found = _read(file, names)
    if found is None:
        damaged = file.exists()  # else a file that is there later is another process's, and stays
        found = _race(_attentions(device, dtype, shape) if what == "attention" else _linears(device, shape))
        keep(file, [json.dumps({**facts, "seconds": found}).encode()], first_wins=not damaged)
        found = _read(file, names) or found
    return found


def summary(device: torch.device) -> dict[str, str]:
    """For ``fedpeft doctor``: for sizes like MiniLM's, what is how many times as fast here."""
    shape = Shape(heads=12, size=32, width=384, inner=1536, length=128)
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        best = fastest_attention(device, dtype, shape)
        times = seconds("attention", device, dtype, shape)
        ratio = times["eager"] / times["sdpa"]
        found[f"attention in {name}"] = f"{best}; sdpa is {ratio:.2g} times as fast as eager"
    times = seconds("linear", device, torch.bfloat16, shape)
    faster = "bf16" if fast_in_bf16(device, shape) else "fp32"
    found["linear layers"] = f"{faster}; bf16 is {times['fp32'] / times['bf16']:.2g} times as fast as fp32"
    return found


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures hold for: the processor and what it can do, or the accelerator; threads; torch's version."""
    if device.type == "cuda":
        name, flags = torch.cuda.get_device_name(device), ""
    else:
        name, flags = _processor()
    return {
        "device": device.type,
        "name": name,
        "flags": flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def folder() -> Path:
    """Where the figures are kept."""
    return cache_folder() / "kernels"


def _processor() -> tuple[str, str]:
    name, flags = platform.processor() or platform.machine(), ""
    with suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        said = {key.strip(): value.strip() for key, _, value in lines}  # of the last core; all are taken for alike
        name = said.get("model name", name)
        has = set((said.get("flags") or said.get("Features") or "").split())
        flags = " ".join(x for x in _FLAGS if x in has)
    return name, flags


def _read(file: Path, names: Sequence[str]) -> Seconds | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        return {name: float(found[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _race(ways: Mapping[str, Callable[[], Tensor]]) -> Seconds:
    """The shortest time of each way, which take turns, so that what else the machine does disturbs them alike."""
    best = dict.fromkeys(ways, float("inf"))
    began = time.perf_counter()
    for round in range(_ROUNDS + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way().flatten()[0].item()  # waits for the device
            if round:
                best[name] = min(best[name], time.perf_counter() - start)
        if round >= _LEAST and time.perf_counter() - began > _SECONDS:
            break
    return best


def _attentions(device: torch.device, dtype: torch.dtype, shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """Both ways, forward and backward, with the mask of a padded batch."""
    rows = max(1, _TOKENS // shape.length)
    generator = torch.Generator().manual_seed(0)
    size = (3, rows, shape.heads, shape.length, shape.size)
    x = torch.randn(size, generator=generator).to(device, dtype).requires_grad_()
    mask = torch.zeros(rows, 1, shape.length, shape.length, device=device, dtype=dtype)
    mask[..., shape.length * 3 // 4 :] = torch.finfo(dtype).min

    def sdpa() -> Tensor:
        query, key, value = x
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return torch.autograd.grad(out.sum(), x)[0]

    def eager() -> Tensor:
        query, key, value = x
        scores = torch.matmul(query, key.transpose(2, 3)) * shape.size**-0.5 + mask
        return torch.autograd.grad(torch.matmul(scores.softmax(-1), value).sum(), x)[0]

    return {"sdpa": sdpa, "eager": eager}


def _linears(device: torch.device, shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """A frozen feed-forward layer's two products, forward and to the gradient of its input."""
    generator = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(size, generator=generator)
        for size in ((_TOKENS, shape.width), (shape.inner, shape.width), (shape.width, shape.inner))
    )

    def way(dtype: torch.dtype) -> Callable[[], Tensor]:
        first, second = up.to(device, dtype), down.to(device, dtype)
        inputs = x.to(device, dtype).requires_grad_()

        def both() -> Tensor:
            out = functional.linear(functional.linear(inputs, first), second)
            return torch.autograd.grad(out.sum(), inputs)[0]

        return both

    return {"fp32": way(torch.float32), "bf16": way(torch.bfloat16)}
