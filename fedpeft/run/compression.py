"""What a run's codecs do to the adapter at hand: which tensors they are for, and the bytes that are left."""

from dataclasses import replace
from math import prod
from pathlib import Path

from fedpeft.adapters import Spec
from fedpeft.channel import Codec, Coding
from fedpeft.channel.blocks import LEAST
from fedpeft.config import Experiment
from fedpeft.errors import ConfigError
from fedpeft.flower import ClientStore, Fleet, Versions
from fedpeft.rounds import answer_size
from fedpeft.rules import Task

_ROUNDS = 4
"""After which no rule sends other tensors than before."""


def check_compression(found: Experiment, spec: Spec) -> None:
    """Raise ConfigError, naming the key, for a codec that would code nothing of this adapter."""
    rule, terms = found.rule, found.compression
    tasks = [Task(spec, round, pass_) for round in range(_ROUNDS) for pass_ in range(rule.passes)]
    shapes = dict((spec.factors("ab") + spec.leaves).shapes)
    down = {n: x for n, x in shapes.items() if n not in rule.constant(spec) | rule.personal(spec)}
    if rule.pool is not None:  # then moves are all that travels
        down = dict(rule.layout(tasks[0]).shapes)
    for key, value, codec, each in (
        ("up", terms.up, terms.codec_up, [x for task in tasks for x in dict(rule.layout(task).shapes).values()]),
        ("down", terms.down, terms.codec_down, list(down.values())),
    ):
        if codec is not None and not any(prod(x) >= LEAST for x in each):
            raise ConfigError(
                f"compression.{key}: got {value!r}, which is for tensors of {LEAST} numbers and more, and the largest "
                f"of this adapter has {max(map(prod, each), default=0)}; want 'none', or a larger adapter.rank"
            )


def compressed(fleet: Fleet, found: Experiment, folder: Path) -> Fleet:
    """The fleet with the run's codecs. folder: the run's, where versions of the adapter are kept."""
    codec = found.compression.codec_down
    versions = None if codec is None else Versions(codec, ClientStore(folder / "versions"))
    return replace(fleet, up=found.compression.codec_up, versions=versions)


def bytes_up(found: Experiment, task: Task) -> int:
    """Bytes of one client's answer to one pass, at most: what zeros and what zstd save is not counted."""
    size, codec = answer_size(found.rule, task, found.evaluation.exactness), found.compression.codec_up
    if codec is None:
        return found.channel.number_bytes * size
    coding = Coding(codec, found.rule.layout(task))
    return coding.most + found.channel.number_bytes * (size - coding.layout.size + coding.behind)


def bytes_of(codec: Codec | None, size: int) -> int:
    """Bytes of the change of a tensor of so many fp32 numbers, on its way down."""
    return 4 * size if codec is None or size < LEAST else codec.length(size)
