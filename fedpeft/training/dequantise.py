"""Matrices in nf4 expanded by bitsandbytes' compiled kernel: of that package its arithmetic, none of its modules."""

import ctypes
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedpeft.errors import ConfigError
from fedpeft.training.environment import showing, without
from fedpeft.training.formats import BLOCK, Packed, unpack
from fedpeft.training.settings import Model

_Kernel: TypeAlias = Callable[[Tensor, Tensor, int, str, list[int], torch.dtype], Tensor]

_HUB = "kernels"  # a package with which bitsandbytes would fetch code from a hub when it is imported
_INSTALL = 'install fedpeft[bnb], or want model.kernels = "own"'


def dequantised(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, columns) in fp32, bf16 or fp16 of ``turned`` codes (rows, columns / 2) and scales
    (rows, columns / 64).

    In fp32 it is what ``formats.unpack`` gives, to the bit; in half precision a number is rounded once, where our own
    way rounds level, scale and product.
    """
    return _kernel()(codes, scales.float().flatten(), BLOCK, "nf4", [len(codes), 2 * codes.shape[1]], dtype)


def turned(codes: Tensor) -> Tensor:
    """A copy of codes in which the first of two is in a byte's high half, as the kernel has it; and the way back."""
    return (codes << 4).bitwise_or_(codes >> 4)


def need_kernel(model: Model, device: torch.device) -> None:
    """Nothing, where a base is to be expanded by ``dequantised`` on this device and can be, or need not be.

    ConfigError, naming model.kernels, where bitsandbytes is not installed or computes something else: each byte is
    expanded once, and compared.
    """
    if model.kernels == "own" or model.quantise != "nf4":
        return
    every = np.arange(256, dtype=np.uint8).reshape(8, BLOCK // 2)
    packed = Packed("nf4", BLOCK, every, np.linspace(-2, 2, 8, dtype=np.float16)[:, None])
    codes, scales = (torch.from_numpy(x).to(device) for x in (packed.codes, packed.scales))
    try:
        found = dequantised(turned(codes), scales, torch.float32)
    except ImportError as error:
        raise ConfigError(f"model.kernels: got 'bitsandbytes', which is not here ({error}); {_INSTALL}") from error
    except (RuntimeError, AttributeError) as error:  # its library is not for this machine, or it is another version
        why = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.kernels: got 'bitsandbytes', which does not run here: {why}; {_INSTALL}") from error
    if not np.array_equal(found.cpu().numpy(), unpack(packed)):
        raise ConfigError(f"model.kernels: the bitsandbytes that is here gives other weights than nf4's; {_INSTALL}")


@cache
def _kernel() -> _Kernel:
    """Of any device that bitsandbytes is for. Raises ImportError."""
    said = logging.getLogger("bitsandbytes")
    level = said.level
    said.setLevel(logging.ERROR)  # it warns that it could fetch nothing
    try:
        with showing("bitsandbytes"), without([x for x in (_HUB,) if x not in sys.modules]):
            import bitsandbytes  # noqa: F401  # it registers its kernels with torch
    finally:
        said.setLevel(level)
    with suppress(OSError, AttributeError):  # its threads are not torch's: they are another OpenMP's
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(torch.get_num_threads())
    found: _Kernel = torch.ops.bitsandbytes.dequantize_4bit.default
    return found
