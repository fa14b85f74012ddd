"""What an image model expects of its pixels."""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file


@dataclass(frozen=True, slots=True)
class Pixels:
    """What an image model expects: side in pixels, channels, and each channel's mean and deviation in [0, 1].

    patch: the side of a patch, of which the image's side must be a multiple; fixed: the side that the
    model's position embeddings were trained at.
    """

    size: int
    patch: int
    fixed: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    deviation: tuple[float, ...] = (0.5, 0.5, 0.5)


def pixels_of(name: str, revision: str | None, config: PreTrainedConfig) -> Pixels:
    """From the model's preprocessor_config.json where it has one, else from its own image size."""
    own = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    patch = getattr(config, "patch_size", 1)
    plain = Pixels(own, patch if isinstance(patch, int) else patch[0], own, config.num_channels)
    file = cached_file(name, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return plain
    said = json.loads(Path(file).read_text(encoding="utf-8"))
    size = said.get("crop_size") if said.get("do_center_crop") else said.get("size")
    side = next(iter(size.values())) if isinstance(size, dict) else size or own
    mean = said.get("image_mean", plain.mean)
    deviation = said.get("image_std", plain.deviation)
    return Pixels(side, plain.patch, own, config.num_channels, tuple(mean), tuple(deviation))
