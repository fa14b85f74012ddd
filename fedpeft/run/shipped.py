"""Kits that the coordinator sends to devices: which one a run has, and where a device keeps it."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.config import Experiment, experiment
from fedpeft.config.runtimes import quantise_of
from fedpeft.errors import ConfigError
from fedpeft.flower import KitMissingError, Shelf
from fedpeft.flower.kits import is_digest
from fedpeft.run.kits import kit_of
from fedpeft.run.runtimes import on_device
from fedpeft.training.environment import cache_folder
from fedpeft.training.kit import Kit

if TYPE_CHECKING:
    from fedpeft.run.workshop import Workshop

Scalar = bool | int | float | str


def to_send(found: Experiment, here: "Workshop", run_config: Mapping[str, Scalar]) -> Path | None:
    """The folder of the kit that a run's devices are sent; None where they are sent none.

    run_config: "kit", a folder that was made before, which a coordinator without torch needs. Else it is made now, in
    the format that ``fleet.kit`` says, and kept for later runs. ConfigError for a kit of another run, or a damaged one.
    """
    wanted, folder = found.fleet.kit, str(run_config.get("kit", ""))
    if not folder and not wanted:
        return None
    if not folder and (is_digest(wanted) or find_spec("torch") is None):
        why = "names a kit by its digest" if is_digest(wanted) else f"is {wanted!r}, and torch is not installed here"
        raise ConfigError(
            f"fleet.kit: {why}; want its folder in the run config, kit='FOLDER', as `fedpeft export-step` makes it on "
            f"a machine with torch"
        )
    digest = wanted if is_digest(wanted) else ""
    quantise = quantise_of(wanted)
    kit = Kit.open(Path(folder), digest=digest) if quantise is None or folder else kit_of(here, quantise)
    if wanted and not is_digest(wanted) and kit.facts.quantise != wanted:
        raise ConfigError(
            f"fleet.kit: got {wanted!r}, and the kit in {kit.folder} holds the base in {kit.facts.quantise!r}; want "
            f"the same"
        )
    if find_spec("onnxruntime") is not None:
        on_device(found, here.federation, kit)  # refuses here what every device would refuse
    return kit.folder


def with_kit(found: Experiment, digest: str) -> Experiment:
    """The experiment as clients are told it: with the kit by its digest, so that no other takes part."""
    settings = found.settings
    return experiment({**settings, "fleet": {**settings["fleet"], "kit": digest}})


def shelf(node_config: Mapping[str, Scalar]) -> Shelf:
    """Where a node keeps kits that it was sent: the folder "kits" of its config, or one in the cache folder."""
    folder = node_config.get("kits")
    return Shelf(cache_folder() / "received" if folder is None else Path(str(folder)))


def kit_here(node_config: Mapping[str, Scalar], settings_json: str) -> Path:
    """The folder of the kit that a node trains this run from.

    node_config: "kit", a folder, or the digest of the only kit that it is to be sent. KitMissingError where it is still
    to be sent; ConfigError where the run's is another, or it has none.
    """
    said = str(node_config.get("kit", ""))
    wanted = str(json.loads(settings_json).get("fleet", {}).get("kit", ""))
    wanted = wanted if is_digest(wanted) else ""  # a format is for the coordinator to know
    if said and not is_digest(said):
        folder, here = Path(said), shelf(node_config)
        if wanted:
            Kit.open(folder, check=False, digest=wanted)
        if folder.resolve().parent == here.folder.resolve():  # where another run's kit may ask for its room
            here.kit(folder.name)
        return folder
    if not wanted:
        raise ConfigError(
            "node-config: kit is missing, from which runtime 'onnx' trains, and this run sends none; want kit='FOLDER' "
            "here, as `fedpeft export-step EXPERIMENT --out FOLDER` makes it on a machine with torch, or fleet.kit = "
            "'int8' in the experiment"
        )
    if said and said != wanted:
        raise ConfigError(
            f"node-config: kit is {said[:16]}…, and the run's is {wanted[:16]}…; want the same: this node takes no "
            f"other"
        )
    if "trust" in node_config and not said:
        raise ConfigError(
            f"node-config: trust is given, and kit is not; a kit says what is computed on this node's data, and a "
            f"coordinator that is not trusted with that data may not choose it: want kit='FOLDER', or "
            f"kit='{wanted}' once you have looked at it"
        )
    found = shelf(node_config).kit(wanted)
    if found is None:
        raise KitMissingError(wanted)
    return found


def mend(node_config: Mapping[str, Scalar], folder: Path) -> None:
    """Raise KitMissingError where this kit was sent, and is damaged by now: its bad files are sent again."""
    here = shelf(node_config)
    if folder.parent == here.folder and here.mend(folder.name):
        raise KitMissingError(folder.name)
