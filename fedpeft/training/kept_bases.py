"""Where packed bases are found: in a kit, or in the cache folder, where they are put once they have been tried.

The folder takes as much room as ``room`` says: those that were used last stay.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import transformers
from torch import Tensor, nn

from fedpeft.data import Task
from fedpeft.errors import ConfigError, DataError
from fedpeft.training.cache import keep
from fedpeft.training.dequantise import turned
from fedpeft.training.environment import cache_folder
from fedpeft.training.fingerprints import stamp
from fedpeft.training.formats import Packed, packed_fingerprint
from fedpeft.training.kit import BASE, MANIFEST, Kit
from fedpeft.training.packed_file import Content, PackedFile, parts, read
from fedpeft.training.quantised import FrozenEmbedding, FrozenLinear
from fedpeft.training.room import hold, make_room
from fedpeft.training.settings import Method, Model, Quantise

_FORMAT = 2  # of what is kept beside a packed file: raise it when that changes


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A packed base that needs no fp32 model.

    plain: the fingerprint of the base in fp32; fresh: its parameters that no file holds; vocabulary: as in ``Base``;
    kit: where it is from one.
    """

    file: PackedFile
    plain: str
    fresh: tuple[str, ...]
    vocabulary: int
    kit: Kit | None = None


@dataclass(frozen=True, slots=True)
class Shelf:
    """What decides which packed base some settings have, and whether it has passed its trial with their method."""

    quantise: Quantise
    method: str
    targets: tuple[str, ...]
    lines: tuple[str, ...]

    @classmethod
    def of(cls, model: Model, method: Method, task: Task, classes: int, kind: str, files: Sequence[Path]) -> "Shelf":
        """kind: the model's class; files: those that decide what is loaded. Rank and scale make no difference."""
        lines = (
            f"format {_FORMAT}, transformers {transformers.__version__}, {kind}, {task}, {classes} classes",
            f"{method.name} {sorted(method.save)} {sorted(method.options.items())!r}",
            *map(stamp, files),
        )
        return cls(model.quantise, method.method, tuple(sorted(method.targets)), lines)

    def find(self) -> Source | None:
        """What has been kept; None if nothing has, or if it is damaged or can't be read."""
        try:
            said = json.loads(self._verdict.read_text(encoding="utf8"))
            plain, fresh = str(said["plain"]), tuple(map(str, said["fresh"]))
            file = _file(plain, self.quantise)
            hold(file)
            return Source(read(file), plain, fresh, int(said["vocabulary"]))
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return None

    def put(
        self,
        content: Mapping[str, Content],
        transposed: frozenset[str],
        plain: str,
        fresh: Sequence[str],
        words: int,
        cosine: float,
    ) -> PackedFile | None:
        """Keep a base that has passed its trial, and how well it did; the file, or None where it can't be written."""
        file = _file(plain, self.quantise)
        trial = {"method": self.method, "targets": self.targets, "cosine": cosine}
        try:
            found = read(file)
        except DataError:
            facts = {"plain": plain, "quantise": self.quantise, **trial}
            if not keep(file, parts(content, transposed, facts)):
                return None
            found = read(file, check=False)
        said = {"plain": plain, "fresh": list(fresh), "vocabulary": words, **trial}
        keep(self._verdict, [json.dumps(said).encode()])
        hold(file)
        make_room(_folder().glob("*.safetensors"), but=file)
        return found

    @property
    def _verdict(self) -> Path:
        text = "\n".join((self.quantise, self.method.lower(), *self.targets, "", *self.lines))
        return _folder() / (sha256(text.encode()).hexdigest() + ".json")


def in_kit(name: str, model: Model, method: Method | None, task: Task) -> Source | None:
    """The base of a kit, if the model's name is a kit's folder. ConfigError where it is not for these settings, or a
    file is not the kit's: what the manifest says of the base holds for these bytes alone. Cost: one pass over them."""
    folder = Path(name)
    if not (folder / MANIFEST).is_file():
        return None
    kit = Kit.open(folder)
    facts = kit.facts
    for key, got, want in (
        ("data.task", task, facts.task),
        ("model.quantise", model.quantise, facts.quantise),
        ("adapter.method", facts.method if method is None else method.name, facts.method),
    ):
        if got != want:
            raise ConfigError(
                f"{key}: got {got!r}; the kit in {folder} was made for {want!r}: use that, or another kit"
            )
    try:
        file = read(kit.path(BASE), check=False)
    except DataError as error:
        raise ConfigError(f"model.name: {error}") from error
    return Source(file, facts.plain, facts.fresh, facts.vocabulary, kit)


def contents(model: nn.Module, names: Mapping[int, str]) -> tuple[dict[str, Content], frozenset[str]]:
    """A packed model's base, as ``packed_file`` writes it, and which of its matrices are transposed.

    names: of the base's own parameters, by their identity: those that are not packed are as they are now.
    """
    found: dict[str, Content] = {}
    transposed = set()
    for module in model.modules():
        own: list[Tensor] = [x for x in module._parameters.values() if x is not None]
        if isinstance(module, FrozenLinear | FrozenEmbedding):  # whose codes may have the identity of what is gone
            if module.name not in found:
                whole = turned(module.codes) if module.kind.compiled else module.codes
                codes, scales = (x.detach().cpu().numpy() for x in (whole, module.scales))
                found[module.name] = Packed(module.kind.format, module.kind.columns, codes, scales)
            if isinstance(module, FrozenLinear) and module.transposed:
                transposed.add(module.name)
        else:
            own += [x for x in module._buffers.values() if x is not None]
        for x in own:
            if id(x) in names:
                here = x.detach().cpu()
                found[names[id(x)]] = np.array((here.float() if here.is_floating_point() else here).numpy())
    return found, frozenset(transposed)


def _folder() -> Path:
    return cache_folder() / "packed"


def _file(plain: str, quantise: Quantise) -> Path:
    return _folder() / f"{packed_fingerprint(plain, quantise)}.safetensors"
