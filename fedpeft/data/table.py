"""A table of examples: what every data set becomes before it is shared out."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Task: TypeAlias = Literal["classify", "lm", "image"]
Rows: TypeAlias = NDArray[np.int64]
"""Row numbers of a table, ascending where nothing else is said."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Examples of one task, row by row.

    inputs: texts ("classify"), prompts ("lm"; an empty prompt is plain language modelling), or pixels
    ("image"), uint8 of shape (N, H, W) or (N, H, W, 3); targets: int64 class numbers of shape (N,), or
    the replies of "lm"; classes: the name of each class number, none for "lm"; clients: who each row
    belongs to by nature, where the data set says so; ranks: the rank that each row says its client has, where a
    column of them was asked for.
    """

    task: Task
    inputs: Sequence[str] | NDArray[np.uint8]
    targets: NDArray[np.int64] | Sequence[str]
    classes: tuple[str, ...] = ()
    clients: tuple[str, ...] | None = None
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        rows = len(self.inputs)
        if len(self.targets) != rows or (self.clients is not None and len(self.clients) != rows):
            clients = "none" if self.clients is None else len(self.clients)
            raise ValueError(f"got {rows} inputs, {len(self.targets)} targets, {clients} clients; want as many of each")
        if (self.task == "image") != isinstance(self.inputs, np.ndarray):
            raise ValueError(
                f"got {type(self.inputs).__name__} inputs for {self.task}; want pixels for image, else texts"
            )
        if isinstance(self.inputs, np.ndarray):
            shape = self.inputs.shape
            if self.inputs.dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in ((), (3,)):
                raise ValueError(
                    f"got {self.inputs.dtype} pixels of shape {shape}; want uint8, (N, H, W) or (N, H, W, 3)"
                )
        if (self.task == "lm") == isinstance(self.targets, np.ndarray):
            raise ValueError(
                f"got {type(self.targets).__name__} targets for {self.task}; want texts for lm, else an array"
            )
        if isinstance(self.targets, np.ndarray):
            if self.targets.dtype != np.int64 or self.targets.ndim != 1:
                raise ValueError(f"got {self.targets.dtype} targets of shape {self.targets.shape}; want int64, (N,)")
            if rows and not (self.targets.min() >= 0 and self.targets.max() < len(self.classes)):
                raise ValueError(
                    f"got class numbers {self.targets.min()} to {self.targets.max()}; want 0 to {len(self.classes) - 1}"
                )
        elif self.classes:
            raise ValueError(f"got {len(self.classes)} classes for lm; want none")

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def texts(self) -> Sequence[str]:
        """The inputs, where they are texts or prompts. Raises ValueError for images."""
        if isinstance(self.inputs, np.ndarray):
            raise ValueError("got a table of images; want one of texts")
        return self.inputs

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The inputs, where they are images: shape (N, H, W) or (N, H, W, 3). Raises ValueError for texts."""
        if not isinstance(self.inputs, np.ndarray):
            raise ValueError(f"got a table of texts ({self.task}); want one of images")
        return self.inputs

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class numbers, shape (N,). Raises ValueError for lm, which has none."""
        if not isinstance(self.targets, np.ndarray):
            raise ValueError("got a table of replies (lm); want one of labels")
        return self.targets

    @property
    def replies(self) -> Sequence[str]:
        """The targets, where they are texts. Raises ValueError for tables of labels."""
        if isinstance(self.targets, np.ndarray):
            raise ValueError(f"got a table of labels ({self.task}); want one of replies")
        return self.targets

    def take(self, rows: Rows) -> "Table":
        """A table of these rows, in this order."""
        numbers = rows.tolist()
        return Table(
            self.task,
            self.inputs[rows] if isinstance(self.inputs, np.ndarray) else tuple(self.inputs[i] for i in numbers),
            self.targets[rows] if isinstance(self.targets, np.ndarray) else tuple(self.targets[i] for i in numbers),
            self.classes,
            None if self.clients is None else tuple(self.clients[i] for i in numbers),
            None if self.ranks is None else tuple(self.ranks[i] for i in numbers),
        )

    def distinct(self) -> Rows:
        """The first row of each group of equal ones, ascending.

        Rows are equal where the input is, whatever the label says; for "lm" where prompt and reply are.
        """
        seen: dict[object, int] = {}
        for row, key in enumerate(self._keys()):
            seen.setdefault(key, row)
        return np.fromiter(seen.values(), np.int64, len(seen))

    def histogram(self) -> tuple[int, ...]:
        """How many rows each class has; empty for "lm"."""
        if not isinstance(self.targets, np.ndarray):
            return ()
        return tuple(int(n) for n in np.bincount(self.targets, minlength=len(self.classes)))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all content in hexadecimal, the same in every process. Cost: one pass over the content."""
        digest = hashlib.sha256()
        shape = self.inputs.shape if isinstance(self.inputs, np.ndarray) else (len(self.inputs),)
        head = {"task": self.task, "shape": shape, "classes": self.classes, "clients": self.clients is not None}
        _add(digest, [json.dumps(head, sort_keys=True)])
        for part in (self.inputs, self.targets, self.clients or (), [str(x) for x in self.ranks or ()]):
            if isinstance(part, np.ndarray):
                digest.update(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes())
            else:
                _add(digest, part)
        return digest.hexdigest()

    def _keys(self) -> Iterable[object]:
        if isinstance(self.inputs, np.ndarray):
            return (hashlib.sha256(image.tobytes()).digest() for image in self.inputs)
        return zip(self.inputs, self.targets, strict=True) if self.task == "lm" else self.inputs


def _add(digest: "hashlib._Hash", texts: Iterable[str]) -> None:
    """Add texts, each with its length before it, so that no two lists give the same bytes."""
    for text in texts:
        content = text.encode("utf8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
