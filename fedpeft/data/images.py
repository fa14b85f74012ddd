"""Images of the user's own data as one array of pixels; the only user of pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

    from fedpeft.data.columns import Columns


def stack(values: Sequence[object], columns: Columns, column: str, side: int | None) -> NDArray[np.uint8]:
    """Pixels of shape (N, H, W) if all images are greyscale, else (N, H, W, 3).

    A value is the path of an image file (relative to the folder of the file that names it), an image of pillow's, or an
    array of 0 to 255, (H, W) or (H, W, 3). ``side``: resize each to a square of so many pixels (bicubic). Raises
    DataError, with its place, for a value that is no image and for one of another size.
    """
    images = [_image(value, row, columns, column) for row, value in enumerate(values)]
    for row, image in enumerate(images):
        if image.mode[0] in "IF":
            raise columns.error(row, column, f"got an image of mode {image.mode}; want 8 bits for each colour")
    mode = "L" if all(image.mode in ("1", "L", "LA") for image in images) else "RGB"
    out = []
    for row, image in enumerate(images):
        if side is not None:
            image = image.convert(mode).resize((side, side))
        elif image.size != images[0].size:
            width, height = image.size
            raise columns.error(
                row,
                column,
                f"got an image of {width} x {height} pixels, the first has {images[0].size[0]} x {images[0].size[1]}; "
                "want one size: set data.side to resize them",
            )
        out.append(np.asarray(image.convert(mode), np.uint8))
    return np.stack(out)


def _image(value: object, row: int, columns: Columns, column: str) -> Image:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError("data.image: images need pillow; install fedpeft[datasets]") from None
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, str):
        path = (columns.path if columns.path.is_dir() else columns.path.parent) / Path(value)
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except FileNotFoundError:
            raise columns.error(row, column, f"no such file {path}") from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise columns.error(row, column, f"{path} can't be read as an image: {error}") from error
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not is_image or array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() > 255:
        raise columns.error(
            row, column, "got no image; want a path, a picture, or whole numbers from 0 to 255 of (H, W) or (H, W, 3)"
        )
    return Image.fromarray(array.astype(np.uint8))
