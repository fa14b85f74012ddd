"""The server's state on disk: one file a round, exact to the bit, and refused if a bit of it has changed."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeft.adapters import Adapter, Layer, LowRank, Spec
from fedpeft.errors import DataError
from fedpeft.report.files import refusal, settle_names, write_whole
from fedpeft.report.strict import Json
from fedpeft.rules import ServerState, Task

SCHEMA = 1
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'\\"sha256\\":\\"([0-9a-f]{64})\\"')
_NATIVE = frozenset(np.dtype(code).name for code in "dfeqQiIhHbB?")

Tensor = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A saved state. extras: what else the run needs to go on; damaged: newer files that can't be used, and why."""

    state: ServerState
    extras: Mapping[str, Json]
    path: Path
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The folder of a run's checkpoints. keep: how many of the newest stay."""

    folder: Path
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep: got {self.keep}; want at least 1 (2, so that a damaged one does no harm)")

    def save(self, state: ServerState, extras: Mapping[str, Json]) -> Path:
        """Write the state after ``state.task.round`` rounds, then remove the oldest; its file.

        Atomic: whenever this is stopped, the newest file is whole. Raises DataError on a full disk,
        with all older checkpoints as they were.
        """
        path = self.folder / f"round-{state.task.round:05d}.safetensors"
        content = encode(state, extras)
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                settle_names(self.folder.parent)
            write_whole(path, content)
            # Files of later rounds are left from before a resume: the run has gone another way, so they go first.
            older = [x for x in self.files() if x <= path]
            for old in [*(x for x in self.files() if x > path), *older[: -self.keep], *self.folder.glob(".*.tmp")]:
                old.unlink()
        except OSError as error:
            raise refusal(path, error) from error
        return path

    def files(self) -> list[Path]:
        """The checkpoints that are there, oldest first."""
        return sorted(self.folder.glob("round-*.safetensors"))

    def at(self, round: int) -> ServerState:
        """The state at the start of a round, as far as it is kept: one that failed has the state of the one before.

        Raises DataError if it is not there, or damaged.
        """
        older = [x for x in self.files() if int(x.stem.rpartition("-")[2]) <= round]
        if not older:
            raise DataError(f"{self.folder}: no checkpoint of round {round}; start the run anew")
        state = read(older[-1]).state
        return replace(state, task=replace(state.task, round=round))

    def load(self) -> Checkpoint:
        """The newest checkpoint that is intact; ``damaged`` says which newer ones were passed over.

        Going on from an older one gives the same adapter, bit for bit, and takes a round longer.
        Raises DataError if there is none.
        """
        damaged: list[str] = []
        for path in reversed(self.files()):
            try:
                return replace(read(path), damaged=tuple(damaged))
            except DataError as error:
                damaged.append(str(error))
        if damaged:
            raise DataError(f"no checkpoint is intact: {'; '.join(damaged)}; start the run anew")
        raise DataError(f"{self.folder}: no checkpoint; start the run anew")


def read(path: Path) -> Checkpoint:
    """The checkpoint in one file. Raises DataError, which names the file, if it is not exactly what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from error
    try:
        state, extras = decode(content)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{path}: {error if isinstance(error, DataError) else 'damaged checkpoint'}") from error
    return Checkpoint(state, extras, path)


def settled(state: ServerState) -> ServerState:
    """The same state in fresh arrays, laid out as a checkpoint gives them back.

    A run that goes on from this computes exactly what a run resumed from the checkpoint does, even
    where a sum's rounding depends on the order of an array in memory.
    """
    return decode(encode(state, {}))[0]


def encode(state: ServerState, extras: Mapping[str, Json]) -> bytes:
    """The state and the extras as the content of a safetensors file that holds its own SHA-256.

    The digest is of the whole content with zeros in its place, so no bit of the file goes unchecked.
    """
    tensors = _tensors(state)
    manifest = {
        "sha256": _NO_DIGEST,
        "schema": SCHEMA,
        "round": state.task.round,
        "pass": state.task.pass_,
        "spec": {
            "layers": [[x.name, x.d, x.k, x.rank, x.scale.hex()] for x in state.task.spec.layers],
            "dense": [[name, list(shape)] for name, shape in state.task.spec.dense],
        },
        "scales": {"layers": _scales(state.adapter.layers), "tail": _scales(state.tail)},
        "tensors": [[key, x.dtype.name, x.dtype.str, list(x.shape)] for key, x in tensors.items()],
        "extras": extras,
    }
    content = save(
        {key: _stored(x) for key, x in tensors.items()},
        {"fedpeft": json.dumps(manifest, allow_nan=False, separators=(",", ":"))},
    )
    found = _DIGEST.search(content)
    assert found is not None
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[: found.start(1)] + digest + content[found.end(1) :]


def decode(content: bytes) -> tuple[ServerState, Mapping[str, Json]]:
    """The inverse of ``encode``. Raises DataError if a bit has changed, and for another schema."""
    found = _DIGEST.search(content[: 8 + int.from_bytes(content[:8], "little")])
    if found is None:
        raise DataError("damaged, or not a checkpoint of fedpeft: it has no digest")
    zeroed = content[: found.start(1)] + _NO_DIGEST.encode() + content[found.end(1) :]
    if hashlib.sha256(zeroed).hexdigest().encode() != found.group(1):
        raise DataError("damaged: its content does not have the digest that was written with it")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    manifest = json.loads(header["__metadata__"]["fedpeft"])
    if manifest["schema"] != SCHEMA:
        raise DataError(
            f"has schema {manifest['schema']}; this version reads schema {SCHEMA}: use the version that wrote it"
        )
    stored = load(content)
    tensors = {key: _restored(stored[key], name, code, shape) for key, name, code, shape in manifest["tensors"]}
    spec = Spec(
        tuple(Layer(n, d, k, rank, float.fromhex(scale)) for n, d, k, rank, scale in manifest["spec"]["layers"]),
        tuple((name, tuple(shape)) for name, shape in manifest["spec"]["dense"]),
    )
    state = ServerState(
        task=Task(spec, manifest["round"], manifest["pass"], _kind(tensors, "shared")),
        adapter=Adapter(
            _layers(tensors, "layers", manifest["scales"]["layers"]), _kind(tensors, "dense"), _kind(tensors, "fixed")
        ),
        tail=_layers(tensors, "tail", manifest["scales"]["tail"]),
        memory=_kind(tensors, "memory"),
        moments=_kind(tensors, "moments"),
    )
    return state, manifest["extras"]


def _tensors(state: ServerState) -> dict[str, Tensor]:
    """Every tensor of a state under "kind/name"; the kind has no slash, so that any name will do."""
    kinds: dict[str, Mapping[str, Tensor]] = {
        "layers.a": {n: x.a for n, x in state.adapter.layers.items()},
        "layers.b": {n: x.b for n, x in state.adapter.layers.items()},
        "dense": state.adapter.dense,
        "fixed": state.adapter.fixed,
        "tail.a": {n: x.a for n, x in state.tail.items()},
        "tail.b": {n: x.b for n, x in state.tail.items()},
        "memory": state.memory,
        "moments": state.moments,
        "shared": state.task.shared,
    }
    return {f"{kind}/{name}": np.asarray(x) for kind, named in kinds.items() for name, x in named.items()}


def _kind(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {key[len(kind) + 1 :]: x for key, x in tensors.items() if key.startswith(f"{kind}/")}


def _layers(tensors: Mapping[str, Tensor], kind: str, scales: Mapping[str, str]) -> dict[str, LowRank]:
    a, b = _kind(tensors, f"{kind}.a"), _kind(tensors, f"{kind}.b")
    return {name: LowRank(a[name], b[name], float.fromhex(scale)) for name, scale in scales.items()}


def _scales(layers: Mapping[str, LowRank]) -> dict[str, str]:
    return {name: float(x.scale).hex() for name, x in layers.items()}


def _is_native(name: str, code: str) -> bool:
    return name in _NATIVE and (code[0] in "<|" if sys.byteorder == "little" else code[0] in ">|")


def _stored(x: Tensor) -> Tensor:
    """x as safetensors can hold it: as itself, or, for what the format does not know, as bytes."""
    x = np.ascontiguousarray(x).reshape(x.shape)
    if _is_native(x.dtype.name, x.dtype.str):
        return x
    if x.dtype.hasobject:
        raise ValueError("a checkpoint holds numbers; got an array of Python objects")
    return np.frombuffer(x.tobytes(), np.uint8)


def _restored(x: Tensor, name: str, code: str, shape: list[int]) -> Tensor:
    if _is_native(name, code):
        return x.reshape(shape).copy()
    return np.frombuffer(x.tobytes(), _dtype(name, code)).reshape(shape).copy()


def _dtype(name: str, code: str) -> np.dtype[Any]:
    try:
        return np.dtype(code if "V" not in code else name)
    except TypeError:
        import ml_dtypes  # bfloat16 and the 8-bit floats, which numpy itself does not have

        return np.dtype(str(getattr(ml_dtypes, name).__name__))
