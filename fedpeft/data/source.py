"""Which data a run is on, as settings."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Source:
    """Which data, and how to read it.

    name: a short name, or the path of a .jsonl file, a .csv file or a folder that ``datasets`` has saved.
    examples: at most this many rows in the federation (``federate`` draws them).
    text, label, client, prompt, reply, image: the columns of the user's own data; prompt = "" for replies without
    prompts (plain language modelling), client = "" to leave a client column alone.
    task: "auto" reads text and label as classify, image and label as image, prompt and reply as lm.
    classes: for a short name, the classes to keep; for the user's own, the labels in the order of their numbers, which
    nodes with files of their own must share. Without it the labels that are found are sorted.
    only: the natural clients to keep; empty for all.
    side: images are resized to squares of so many pixels; without it all must be of one size.
    split: which part of a folder that holds several.
    """

    name: str
    examples: int | None = None
    text: str = "text"
    label: str = "label"
    client: str = "client"
    prompt: str = "prompt"
    reply: str = "reply"
    image: str = "image"
    task: Literal["auto", "classify", "lm", "image"] = "auto"
    classes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    side: int | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        for key in ("name", "text", "label", "reply", "image", "split"):
            if not getattr(self, key):
                raise ValueError(f"{key}: got {getattr(self, key)!r}; want some text")
        for key in ("examples", "side"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key}: got {getattr(self, key)}; want at least 1")
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes: got {', '.join(self.classes)}; want at least 2, all different")
