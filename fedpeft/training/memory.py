"""How much memory training takes in this process, by a model at hand: the plan's formula (``predict``)."""

import re
from collections.abc import Mapping
from typing import Protocol

from fedpeft.adapters import Spec
from fedpeft.training import predict as formula
from fedpeft.training.predict import LOGITS, Engine, Load, Parts, Sizes, kept_below, predict
from fedpeft.training.settings import Quantise, Training

__all__ = ["LOGITS", "RUNTIME", "Config", "estimate", "parts"]

RUNTIME = formula.RUNTIME["torch"]
"""Bytes that Python, torch, transformers and peft take on a CPU before there is a model."""

HEAP = 1.75
"""How many times what a step makes is taken where freed memory is kept for the next step (``environment.prepare``), and
not given back at once (``environment.sparing``): measured on MiniLM, for batches of 8 and 16 texts of 128 tokens."""

_LAYER = re.compile(r"\.(\d+)\.")


class Config(Protocol):
    """A transformers configuration."""

    def to_dict(self) -> Mapping[str, object]: ...


def estimate(
    config: Config,
    base_parameters: int,
    spec: Spec,
    training: Training,
    quantise: Quantise = "none",
    sparing: bool = False,
    trains: str = "ab",
    texts: int | None = None,
) -> int:
    """Bytes of a training process at its peak, on a CPU. sparing: with an allocator that gives back what is freed;
    trains: the factors that it trains, "a", "b" or "ab"; texts: how many it trains and is evaluated on, if that is
    known, of which ``training.lower`` keeps something.

    It reads whether the model is a language model off ``config.problem_type``, which ``load_base`` sets on others.
    Within 10 % where the process is sparing, and 30 % where it isn't; eager attention's square of the length is not in
    it.
    """
    found = parts(config, base_parameters, spec, training, quantise, trains=trains, texts=texts)
    step = found.activations + found.work
    return found.total + (0 if sparing else round((HEAP - 1) * step))


def parts(
    config: Config,
    base_parameters: int,
    spec: Spec,
    training: Training,
    quantise: Quantise = "none",
    engine: Engine = "torch",
    trains: str = "ab",
    texts: int | None = None,
) -> Parts:
    """The parts of the peak of a process that gives back what is freed. texts: as for ``estimate``."""
    sizes = Sizes.of(config.to_dict())
    length = training.length
    if sizes.patch:
        length = ((training.image_size or sizes.side) // sizes.patch) ** 2 + 1
    names = [x.name for x in spec.layers] or [n for n, _ in spec.dense]
    numbers = [int(found[1]) for n in names if (found := _LAYER.search(n))]
    load = Load(
        parameters=base_parameters,
        trained=spec.factors(trains).size + spec.leaves.size,
        targets=tuple(sorted({x.name.rsplit(".", 1)[-1] for x in spec.layers})),
        layers=sizes.layers - min(numbers, default=0),
        rows=training.rows,
        length=length,
        trains_a="a" in trains,
        moments=2 if training.optimiser == "adamw" else int(training.momentum > 0),
        checkpointing=training.checkpointing,
        quantise=quantise,
        half=training.precision == "bf16",
        engine=engine,
        kept=kept_below(sizes, training, texts),
    )
    return predict(sizes, load)
