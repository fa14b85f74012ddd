"""A kit: the folder that a device without torch trains from, and the manifest that says what is in it.

Importing this file imports neither torch nor onnx.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import file_digest, sha256
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedpeft import __version__
from fedpeft.adapters import Adapter, Layer, LowRank, Spec
from fedpeft.errors import ConfigError
from fedpeft.training.formats import Format
from fedpeft.training.settings import Quantise

FORMAT = 2
"""Of the manifest and of what it stands for: raised when an older version could not read it."""

OPSET = 21
"""The newest ONNX opset that kits are made with, and that is run here: the first with types of 4 bits."""

MANIFEST, BASE, STEP, EVALUATE, START = (
    "kit.json",
    "base.safetensors",
    "step.onnx",
    "evaluate.onnx",
    "start.safetensors",
)
TOKENIZER, TEMPLATE, CONFIG = "tokenizer.json", "chat_template.jinja", "config.json"

_NEEDED = (BASE, STEP, EVALUATE, START, TOKENIZER)
NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)
"""Of a file of a kit: on every system, and on the wire."""

PackedAs: TypeAlias = tuple[str, Format, int, bool]
"""A packed matrix: its name in the model, its format, its columns, and whether it is the transpose of the model's."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a manifest says of a kit, but for its files.

    model: the name in the settings that it was made from; plain: fingerprint of the base in fp32; quantise: what its
    matrices are held in; method: peft's name; spec: of the adapter; trains: "ab", or "b" where the graph has no
    gradients of a; recompute: whether the graph computes activations again for the backward half; pad: the token that
    fills up; bos, eos: marks around texts that no chat template is for, or empty; marks: what a chat
    template may call "bos_token", "eos_token" and so on; longest: most tokens of a row;
    cuts: where a text that is to be classified loses what is too long;
    words: rows of the embedding; vocabulary: logits of a position, 0 for
    "classify", and where the head may not be run by itself; packed: matrices that are; fresh:
    parameters that the model's files don't hold; checked: how far the graph was from torch when it was made: "loss",
    relative, "gradient", 1 − cosine; seed: of the start and
    of what is fresh, as ``load_base`` takes it.
    """

    opset: int
    task: Literal["classify", "lm"]
    classes: tuple[str, ...]
    model: str
    plain: str
    quantise: Quantise
    method: str
    spec: Spec
    trains: Literal["ab", "b"]
    recompute: bool
    pad: int
    bos: str
    eos: str
    longest: int
    words: int
    vocabulary: int = 0
    packed: tuple[PackedAs, ...] = ()
    fresh: tuple[str, ...] = ()
    cuts: Literal["right", "left"] = "right"
    marks: Mapping[str, str] = field(default_factory=dict[str, str])
    checked: Mapping[str, float] = field(default_factory=dict[str, float])
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Kit:
    """A folder whose manifest has been read. digest: SHA-256 of the manifest in hex; files: digest and bytes of each.

    made: the version of fedpeft that wrote it.
    """

    folder: Path
    digest: str
    made: str
    facts: Facts
    files: Mapping[str, tuple[str, int]]

    @classmethod
    def open(cls, folder: Path, check: bool = True, digest: str = "") -> "Kit":
        """The kit in a folder. check: whether its files are read and compared with the manifest, at the cost of
        one pass over them; digest: the kit that it must be (empty: any).

        ConfigError, naming the file, for one that is missing, damaged, made for a later version or another kit's.
        """
        file = folder / MANIFEST
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"kit: there is no {MANIFEST} in {folder} ({error.strerror}); want a folder that "
                f"`fedpeft export-step` wrote"
            ) from error
        found = sha256(content).hexdigest()
        if digest and found != digest:
            raise ConfigError(
                f"kit: {file} has digest {found[:16]}…; the coordinator wants {digest[:16]}…: copy that kit here"
            )
        made, facts, files = _read(file, content)
        kit = cls(folder, found, made, facts, files)
        for name in files:
            kit._check(name, whole=check)
        return kit

    @property
    def spec(self) -> Spec:
        """The adapter's public shape."""
        return self.facts.spec

    @property
    def quantise(self) -> Quantise:
        """What the base's matrices are held in."""
        return self.facts.quantise

    @property
    def plain(self) -> str:
        """The fingerprint of the base in fp32."""
        return self.facts.plain

    @property
    def template(self) -> str | None:
        """The chat template, if the tokenizer has one."""
        return (self.folder / TEMPLATE).read_text(encoding="utf8") if TEMPLATE in self.files else None

    def path(self, name: str) -> Path:
        """Where a file of the kit is. ValueError for one that it doesn't have."""
        if name not in self.files:
            raise ValueError(f"got {name!r}; the kit in {self.folder} has {', '.join(self.files)}")
        return self.folder / name

    def start(self) -> Adapter:
        """The adapter before any training: fp32 copies. ConfigError if the file doesn't hold one of this spec."""
        file = self.path(START)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"kit: {file} can't be read: {error}; {_AGAIN}") from error
        fixed = {n.removeprefix("fixed/"): tensors.pop(n) for n in list(tensors) if n.startswith("fixed/")}
        want = dict((self.spec.factors("ab") + self.spec.leaves).shapes)
        got = {n: x.shape for n, x in tensors.items()}
        for name in sorted(got.keys() | want.keys()):
            if got.get(name) != want.get(name):
                raise ConfigError(
                    f"kit: {file} has {name} of shape {got.get(name, 'none')}; {MANIFEST} wants "
                    f"{want.get(name, 'none')}: {_AGAIN}"
                )
        for name, x in tensors.items():
            if x.dtype != np.float32 or not np.isfinite(x).all():
                got_kind = "numbers that are not finite" if x.dtype == np.float32 else str(x.dtype)
                raise ConfigError(f"kit: {file} has {name} in {got_kind}; want finite float32: {_AGAIN}")
        layers = {x.name: LowRank(tensors[f"{x.name}/a"], tensors[f"{x.name}/b"], x.scale) for x in self.spec.layers}
        return Adapter(layers, {n: tensors[n] for n, _ in self.spec.dense}, fixed)

    def _check(self, name: str, whole: bool) -> None:
        file, (digest, size) = self.folder / name, self.files[name]
        try:
            got = file.stat().st_size
            if got != size:
                raise ConfigError(f"kit: {file} has {got:,} bytes; {MANIFEST} wants {size:,}: {_AGAIN}")
            found = hashed(file) if whole else digest
        except OSError as error:
            raise ConfigError(f"kit: {file} can't be read ({error.strerror}); {_AGAIN}") from error
        if found != digest:
            raise ConfigError(
                f"kit: {file} has SHA-256 {found[:16]}…; {MANIFEST} wants {digest[:16]}…: it is damaged, or "
                f"another kit's; {_AGAIN}"
            )


_AGAIN = "copy the kit again, or export it anew"


def write_manifest(folder: Path, facts: Facts) -> str:
    """Describe all files in a folder, and these facts, in its kit.json; the kit's digest. Call it last.

    ValueError if a file that every kit has is not there. The text depends on nothing but facts, files and version.
    """
    here = sorted(x.name for x in folder.iterdir() if x.is_file() and x.name != MANIFEST)
    if missing := [n for n in _NEEDED if n not in here]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; want all of {', '.join(_NEEDED)}")
    said: dict[str, object] = {"format": FORMAT, "fedpeft": __version__}
    said |= {x.name: getattr(facts, x.name) for x in fields(Facts)}
    spec = facts.spec
    said["spec"] = {"layers": [[x.name, x.d, x.k, x.rank, x.scale] for x in spec.layers], "dense": spec.dense}
    said |= {"marks": dict(facts.marks), "checked": dict(facts.checked)}
    said["files"] = {n: [hashed(folder / n), (folder / n).stat().st_size] for n in here}
    content = (json.dumps(said, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    return sha256(content).hexdigest()


def hashed(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _read(file: Path, content: bytes) -> tuple[str, Facts, dict[str, tuple[str, int]]]:
    """What wrote a manifest, what it says, and its files."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"kit: {file} is not JSON ({error}); {_AGAIN}") from error
    version = said.get("format") if isinstance(said, dict) else None
    if type(version) is not int:
        raise ConfigError(f"kit: {file} says no format; want {FORMAT}: {_AGAIN}")
    made = str(said.get("fedpeft", "an unknown version"))
    if version != FORMAT:
        raise ConfigError(
            f"kit: {file} has format {version}, of fedpeft {made}; fedpeft {__version__} reads {FORMAT}: "
            f"use one version of fedpeft on this device and where the kit is exported"
        )
    opset = said.get("opset")
    if isinstance(opset, int) and opset > OPSET:
        raise ConfigError(
            f"kit: {file} says that its graphs are of ONNX opset {opset}; fedpeft {__version__} runs up to {OPSET}: "
            f"install fedpeft {made} here, or export the kit with this version"
        )
    try:
        files = {n: _as(tuple[str, int], x, n) for n, x in said["files"].items()}
        kinds = get_type_hints(Facts)
        values: dict[str, Any] = {n: _as(kind, said[n], n) for n, kind in kinds.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is not a kit's: {error}"
        raise ConfigError(f"kit: {file} {what}; {_AGAIN}") from error
    if odd := [n for n in files if not NAME.fullmatch(n)]:
        raise ConfigError(f"kit: {file} names the file {odd[0]!r}; want files of its own folder: {_AGAIN}")
    if missing := [n for n in _NEEDED if n not in files]:
        raise ConfigError(f"kit: {file} names no {missing[0]}; want {', '.join(_NEEDED)}: {_AGAIN}")
    return made, Facts(**values), files


def _spec(said: Mapping[str, Any]) -> Spec:
    """The adapter's shape; TypeError or ValueError for one that no adapter has."""
    rows = _as(tuple[tuple[str, int, int, int, float], ...], said["layers"], "spec.layers")
    dense = _as(tuple[tuple[str, tuple[int, ...]], ...], said["dense"], "spec.dense")
    spec = Spec(tuple(Layer(*x) for x in rows), dense)
    for x in spec.layers:
        if min(x.d, x.k, x.rank) < 1 or not isfinite(x.scale):
            raise ValueError(f"spec.layers: {x.name} is {x.d} x {x.k} of rank {x.rank} and scale {x.scale}")
    for name, shape in (spec.factors("ab") + spec.leaves).shapes:  # which are named once each
        if min(shape, default=1) < 0:
            raise ValueError(f"spec.dense: {name} has shape {shape}")
    return spec


def _as(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as this type says; TypeError, naming it, for another."""
    if kind is Spec:
        return _spec(value)
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal and value in parts:
        return value
    if origin is tuple and isinstance(value, list):
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_as(k, x, name) for k, x in zip(each, value, strict=True))
    if origin is Mapping and isinstance(value, dict):
        return {n: _as(parts[1], x, name) for n, x in value.items()}
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    raise TypeError(f"{name}: got {value!r}")
