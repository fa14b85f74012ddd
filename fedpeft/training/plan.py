"""Which settings fit a device: every choice's memory and bytes foretold, and the one that fits with the least harm."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TypeVar

from fedpeft.channel import CODECS
from fedpeft.errors import ConfigError
from fedpeft.training.predict import Engine, Load, Parts, Sizes, predict
from fedpeft.training.settings import Quantise

Name = TypeVar("Name", bound=str)

FORMATS: dict[Engine, tuple[Quantise, ...]] = {"torch": ("none", "int8", "nf4"), "onnx": ("none", "int8", "int4")}
"""What a base is held in, by what runs it, from the most exact."""

ENGINES: tuple[Engine, ...] = ("torch", "onnx")

ONDEVICE = ("bert", "llama", "gpt2")
"""Families whose training step can be exported."""

UP, DOWN = ("none", "bf16", "int8", "int4", "ternary", "sign"), ("none", "bf16", "int8")
"""Codecs of what travels, from the most exact."""

HARM = {
    "micro": 1,
    "checkpointing": 4,
    "int8": 6,
    "engine": 15,
    "4 bits": 20,
    "length": 30,
    "ffa": 35,
    "layers": 40,
    "rank": 45,
}
"""What a change costs, in no unit, each halving for itself: those that change no result come first, then what rounds
the base, then what cuts texts, then what trains less."""

_SPARE = 0.05  # of a budget, for what the formula does not see
_SHARE = 0.5  # of a round, for what travels: the rest is for training
_SHORTEST = 32  # tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings of a client that decide its memory and its bytes. micro: rows of a pass; layers: that are adapted,
    the top ones; both: whether both factors are trained, or FFA's one; up, down: codecs, "none" for fp32; kept: bytes
    of what the lower layers make of texts, with torch."""

    engine: Engine
    quantise: Quantise
    targets: tuple[str, ...]
    rank: int
    layers: int
    batch: int
    micro: int
    length: int
    checkpointing: bool
    both: bool = True
    moments: int = 2
    up: str = "none"
    down: str = "none"
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """bits: a second; seconds: of a round."""

    bits: float
    seconds: float

    def holds(self, up: int, down: int) -> bool:
        """Whether so many bytes travel in half of a round."""
        return 8 * (up + down) <= _SHARE * self.bits * self.seconds


@dataclass(frozen=True, slots=True)
class Fit:
    """A choice with what it takes. harm: by ``HARM``, against what was wanted."""

    choice: Choice
    parts: Parts
    up: int
    down: int
    harm: float


@dataclass(frozen=True, slots=True)
class Plan:
    """best: the choice that fits with the least harm; others: of each other runtime and format its own best."""

    best: Fit
    others: tuple[Fit, ...]


@dataclass(frozen=True, slots=True)
class Planner:
    """A model and what is trained on it. classes: of a head that is trained whole, with BERT's pooler, 0 for a language
    model; parameters: of the base, as counted or known; engines: that a device may run."""

    sizes: Sizes
    parameters: int
    classes: int = 0
    engines: tuple[Engine, ...] = ("torch", "onnx")

    def taken(self, choice: Choice, wanted: Choice) -> Fit:
        """What a choice takes."""
        a, b, head = self._numbers(choice)
        moved = self._moved(choice)
        load = Load(
            parameters=self.parameters,
            trained=a + b + head,
            targets=choice.targets,
            layers=choice.layers,
            rows=choice.micro,
            length=choice.length,
            trains_a=choice.both,
            moments=choice.moments,
            checkpointing=choice.checkpointing,
            quantise=choice.quantise,
            engine=choice.engine,
            kept=choice.kept,
        )
        up, down = coded(choice.up, moved), coded(choice.down, moved)
        return Fit(choice, predict(self.sizes, load), up, down, _harm(choice, wanted))

    def plan(self, wanted: Choice, budget: float, link: Link | None = None) -> Plan:
        """The plan for a budget in bytes. Raises ConfigError, with the smallest that there is, where nothing fits."""
        fits: dict[tuple[str, str], Fit] = {}
        least: Fit | None = None
        slim: Fit | None = None
        for choice in self.choices(wanted):
            found = self.taken(choice, wanted)
            if least is None or found.parts.total < least.parts.total:
                least = found
            if not self.fits(found, budget):
                continue
            sent = self.sent(found, wanted, link)
            if slim is None or sent.up + sent.down < slim.up + slim.down:
                slim = sent
            key = choice.engine, choice.quantise
            if (link is None or link.holds(sent.up, sent.down)) and (key not in fits or sent.harm < fits[key].harm):
                fits[key] = sent
        assert least is not None, "what is wanted is a choice"
        if fits:
            best, *others = sorted(fits.values(), key=lambda x: (x.harm, x.parts.total))
            return Plan(best, tuple(others))
        if slim is None:
            over = least.parts.total - budget
            raise ConfigError(
                f"plan: nothing fits in {budget / 1e6:.0f} MB; the least is {least.parts.total / 1e6:.0f} MB, "
                f"{over / 1e6:.0f} MB more, with {told(least.choice, None)}: want such a budget, or a smaller model"
            )
        raise ConfigError(
            f"plan: nothing fits the link; the least that travels is {(slim.up + slim.down) / 1e3:.0f} kB a round, "
            f"with {told(slim.choice, None)}: want a longer round, or a faster link"
        )

    def fits(self, found: Fit, budget: float) -> bool:
        """Whether it takes at most 95 % of so many bytes."""
        return found.parts.total <= (1 - _SPARE) * budget

    def sent(self, fit: Fit, wanted: Choice, link: Link | None) -> Fit:
        """The fit with the first codecs that the link holds; with the last ones where it holds none."""
        if link is None or link.holds(fit.up, fit.down):
            return fit
        numbers = self._moved(fit.choice)
        pairs = sorted(product(_from(UP, wanted.up), _from(DOWN, wanted.down)), key=_coarseness)
        best = next((x for x in pairs if link.holds(*(coded(name, numbers) for name in x))), pairs[-1])
        return self.taken(replace(fit.choice, up=best[0], down=best[1]), wanted)

    def choices(self, wanted: Choice) -> Iterator[Choice]:
        """All that is tried: each setting as wanted, and halved as often as makes sense; codecs as wanted."""
        for engine in dict.fromkeys((wanted.engine, *self.engines)):
            if engine != wanted.engine and self.sizes.family not in ONDEVICE:
                continue
            formats = _from(FORMATS[engine], wanted.quantise)
            for quantise, checkpointing, both in product(
                formats, dict.fromkeys((wanted.checkpointing, True)), dict.fromkeys((wanted.both, False))
            ):
                for micro, length, layers, rank in product(
                    _halved(wanted.micro, 1),
                    _halved(wanted.length, _SHORTEST),
                    _halved(wanted.layers, 1),
                    _halved(wanted.rank, 1),
                ):
                    yield replace(
                        wanted,
                        engine=engine,
                        quantise=quantise,
                        checkpointing=checkpointing,
                        both=both,
                        micro=micro,
                        length=length,
                        layers=layers,
                        rank=rank,
                    )

    def _moved(self, choice: Choice) -> int:
        """Numbers that travel."""
        a, b, head = self._numbers(choice)
        return (a if choice.both else 0) + b + head

    def _numbers(self, choice: Choice) -> tuple[int, int, int]:
        """Numbers of all a, of all b, and of what is trained whole."""
        found = self.sizes.trained(choice.targets, choice.rank, choice.layers).values()
        width = self.sizes.width
        pooled = width * (width + 1) if self.classes and self.sizes.family == "bert" else 0
        head = self.classes * (width + 1) + pooled
        return sum(a for a, _ in found), sum(b for _, b in found), head


@cache
def coded(name: str, size: int) -> int:
    """Bytes of so many numbers under a codec's name, "none" for fp32."""
    codec = CODECS.get(name)
    return 4 * size if codec is None else codec.length(size)


def changes(choice: Choice, wanted: Choice | None) -> Iterator[tuple[str, str]]:
    """The keys of an experiment, and their values in TOML, that a choice sets otherwise than what was wanted; all that
    is worth saying of it if nothing is given."""
    w = wanted
    if w is None or choice.micro != w.micro:
        yield "training.micro", str(choice.micro)
    if choice.checkpointing != (w is not None and w.checkpointing):
        yield "training.checkpointing", str(choice.checkpointing).lower()
    if choice.quantise != ("none" if w is None else w.quantise):
        yield "model.quantise", f'"{choice.quantise}"'
    if w is None or choice.length != w.length:
        yield "training.length", str(choice.length)
    if w is None or choice.rank != w.rank:
        yield "adapter.rank", str(choice.rank)
    if w is None or choice.layers != w.layers:
        yield "adapter.layers", str(choice.layers)
    if choice.both != (w is None or w.both):
        yield "rule.name", '"ffa"'
    if choice.up != ("none" if w is None else w.up):
        yield "compression.up", f'"{choice.up}"'
    if choice.down != ("none" if w is None else w.down):
        yield "compression.down", f'"{choice.down}"'


def told(choice: Choice, wanted: Choice | None) -> str:
    """A choice in words: ``changes``, and the node's runtime."""
    each = [f"{key} = {value}" for key, value in changes(choice, wanted)]
    if choice.engine != ("torch" if wanted is None else wanted.engine):
        each.append(f'runtime="{choice.engine}" in the node\'s config')
    return ", ".join(each)


def _harm(choice: Choice, wanted: Choice) -> float:
    h = HARM
    bits: dict[Quantise, float] = {"none": 0.0, "int8": h["int8"], "nf4": h["4 bits"], "int4": h["4 bits"] + 1}
    return (
        h["micro"] * _times(wanted.micro, choice.micro)
        + h["checkpointing"] * (choice.checkpointing - wanted.checkpointing)
        + max(0.0, bits[choice.quantise] - bits[wanted.quantise])
        + h["engine"] * (choice.engine != wanted.engine)
        + h["length"] * _times(wanted.length, choice.length)
        + h["ffa"] * (wanted.both - choice.both)
        + h["layers"] * _times(wanted.layers, choice.layers)
        + h["rank"] * _times(wanted.rank, choice.rank)
        + 2 * (_at(UP, choice.up) - _at(UP, wanted.up) + _at(DOWN, choice.down) - _at(DOWN, wanted.down))
    )


def _coarseness(pair: tuple[str, str]) -> int:
    return _at(UP, pair[0]) + _at(DOWN, pair[1])


def _at(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else 0


def _times(wanted: int, got: int) -> int:
    """How often a number has been halved."""
    return next(n for n, x in enumerate(_halved(wanted, 1)) if x <= got)


@cache
def _halved(number: int, least: int) -> tuple[int, ...]:
    found = [number]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(found)


def _from(names: Sequence[Name], name: Name) -> Sequence[Name]:
    """The names from this one on; all of them where it is not among them."""
    return names[names.index(name) :] if name in names else names
