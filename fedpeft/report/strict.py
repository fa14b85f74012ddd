"""Values as strict JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"


def finite(x: float) -> float | None:
    """x, or None where it is NaN or infinite: JSON has no such numbers."""
    return float(x) if math.isfinite(x) else None


def plain(value: object) -> Json:
    """``value`` as strict JSON: keys become text, numpy numbers plain ones, NaN and infinities null."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence | np.ndarray):
        return [plain(x) for x in value]
    raise ValueError(f"a record holds numbers, texts, lists and tables; got {type(value).__name__}")
