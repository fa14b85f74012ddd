"""Kits for clients that train on onnxruntime: made once, and kept in the cache folder."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft import __version__
from fedpeft.config import Experiment
from fedpeft.errors import ConfigError
from fedpeft.flower.kits import is_digest
from fedpeft.flower.packing import digest_of
from fedpeft.run.runtimes import others
from fedpeft.training.environment import cache_folder
from fedpeft.training.kit import FORMAT, MANIFEST, Kit
from fedpeft.training.room import hold, make_room
from fedpeft.training.settings import Quantise
from fedpeft.training.whole import link, whole

if TYPE_CHECKING:
    from fedpeft.run.workshop import Workshop


def kept_kit(here: "Workshop", quantise: Quantise) -> Path:
    """Where the kit of a workshop's experiment is kept with the base in this format, whether or not it is there."""
    trainer, training = here.trainer, here.trainer.training  # first: it is loaded with others' packages hidden
    from fedpeft.training.token_files import wording_of

    start, base = trainer.start(), trainer.frozen
    config = base.model.config.to_dict() | {"_name_or_path": ""}
    made_of = [
        __version__,
        FORMAT,
        trainer.base,
        base.name,
        json.dumps(config, sort_keys=True, default=str),
        wording_of(base.tokenizer),
        digest_of(start.tensors() | {f"fixed/{name}": x for name, x in start.fixed.items()}),
        quantise,
        training.length,
        training.checkpointing,
        here.federation.table.task,
        list(here.federation.table.classes),
    ]
    return cache_folder() / "kits" / sha256(json.dumps(made_of).encode()).hexdigest()


def missing(here: "Workshop") -> list[Quantise]:
    """The formats of the kits that a simulated run's clients need, and that are not there yet."""
    wanted = [x.quantise for x in others(here.found) if x.engine == "onnx"]
    return [quantise for quantise in wanted if _kept(kept_kit(here, quantise)) is None]


def kit_of(here: "Workshop", quantise: Quantise, progress: Callable[[str], None] | None = None) -> Kit:
    """The kit, made by an export in this process if it is not there yet, or is damaged: in seconds to minutes.

    progress: told what is going on.
    """
    folder = kept_kit(here, quantise)
    if (kit := _kept(folder)) is not None:
        return kit
    from fedpeft.training.export_step import export_step

    folder.parent.mkdir(parents=True, exist_ok=True)
    export_step(here.held_in(quantise).trainer, folder, progress=progress)
    hold(folder)
    make_room([x for x in folder.parent.iterdir() if is_digest(x.name)], but=folder)
    return Kit.open(folder)


def export_kit(
    found: Experiment, out: Path, quantise: Quantise | None, progress: Callable[[str], None] | None = None
) -> tuple[Kit, str]:
    """Put an experiment's kit into a folder, as links to the kept one or copies of it; the kit, and "new" or "kept".

    quantise: what the base is held in, if not as the experiment says. ConfigError as ``export_step``.
    """
    from fedpeft.run.workshop import without_data, workshop

    wanted = quantise or found.model.quantise
    if found.model.formats and wanted not in found.model.formats:
        raise ConfigError(f"--quantise: got {wanted!r}; want one of model.formats: {', '.join(found.model.formats)}")
    here = without_data(found) if found.fleet.own_data else workshop(found.settings_json)
    known = _kept(kept_kit(here, wanted))
    kept = known or kit_of(here, wanted, progress)
    with whole(out) as scratch:
        for name in (*kept.files, MANIFEST):
            link(kept.folder / name, scratch / name)
    return Kit.open(out, digest=kept.digest), "new" if known is None else "kept"


def _kept(folder: Path) -> Kit | None:
    """A kit that is kept, if it is whole: a process that was killed may have left half of one, a disk worse."""
    hold(folder)
    try:
        return Kit.open(folder)
    except ConfigError:
        return None
