"""What the coordinator asks of clients, as Flower records.

``unpack_…`` raises ProtocolError, and nothing else, for what the other side can't have meant. Each
request carries the run's settings, so that a client can be built from any message.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Literal, TypeAlias, get_args

import numpy as np
from flwr.app import RecordDict

from fedpeft.adapters import Adapter, LowRank, Spec, lasting
from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.packing import Json, Parcel, Tensor, apart, digest_of, glance, pack, unpack
from fedpeft.flower.small import narrowed, narrowed_tail, widen
from fedpeft.flower.versions import Step, Version, is_moving, packed
from fedpeft.rules import Broadcast, Task

Part: TypeAlias = Literal["train", "validation", "test", "central", "tuned"]
_PARTS: tuple[Part, ...] = get_args(Part)
_REQUEST = ("settings", "base", "round", "pass", "spec", "adapter", "tail", "constants", "parts")
_VERSION = "version"
_MODEL = ("round", "pass", "spec", "adapter", "tail", "constants")


class ConstantsMissing(ProtocolError):  # noqa: N818
    """The message names constants by digest that this node doesn't hold: it needs them in full."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request to train, or to evaluate ``parts``: "tuned" is the test rows, once the client has trained for itself as
    the settings say.

    base: the fingerprint of the coordinator's base; constants: what travels once, by its digest
    (empty if nothing does), held or brought along; brought: whether it came in full; parcel: all of it, as it came.
    """

    settings: str
    base: str
    broadcast: Broadcast
    parts: tuple[Part, ...]
    digest: str
    constants: Mapping[str, Tensor]
    brought: bool
    parcel: Parcel

    @property
    def model(self) -> bytes:
        """The digest of what came to train on: ``model_digest`` of what was sent."""
        return _model_of(self.parcel)


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A request to say what a node can do. start: the client that should send its start adapter as well."""

    settings: str
    start: int | None = None


def constants_of(adapter: Adapter, names: frozenset[str]) -> dict[str, Tensor]:
    """What of an adapter travels once: its fixed tensors, and those of ``names`` (as ``tensors()`` names them)."""
    mine = adapter.tensors()
    return {f"constant/{n}": mine[n] for n in sorted(names)} | {f"fixed/{n}": x for n, x in lasting(adapter).items()}


def pack_request(
    kind: Literal["train", "evaluate"],
    broadcast: Broadcast,
    settings: str,
    base: str,
    constant: frozenset[str] = frozenset(),
    in_full: bool = True,
    parts: tuple[Part, ...] = (),
    version: Version | None = None,
    steps: tuple[Step, ...] | None = None,
) -> RecordDict:
    """A request, with constants (fixed tensors, and those named by ``constant``) in full or by digest alone.

    After a round's first pass the adapter does not travel again: clients have kept their update. version: what it
    travels as, instead of itself, by these steps or whole.
    """
    parcel = _parcel(kind, broadcast, settings, base, constant, in_full, parts)
    if version is not None:
        said, tensors = packed(version, steps)
        still = {n: x for n, x in parcel.tensors.items() if n not in version.tensors}
        parcel = replace(parcel, facts={**parcel.facts, _VERSION: said}, tensors=still | tensors)
    return pack(parcel)


def moving(broadcast: Broadcast, constant: frozenset[str] = frozenset()) -> dict[str, Tensor]:
    """The tensors of a first pass that there are versions of, as a request names them."""
    return is_moving(_parcel("train", broadcast, "", "", constant, False, ()).tensors)


def model_digest(broadcast: Broadcast, constant: frozenset[str] = frozenset()) -> bytes:
    """SHA-256 of what a client is sent to train on, as it travels: what ``Request.model`` of the request gives.

    Of a layer in core form it is the cores that travel: what they are multiplied out to depends on the machine.
    """
    return _model_of(_parcel("train", broadcast, "", "", constant, False, ()))


def _model_of(parcel: Parcel) -> bytes:
    facts = {name: parcel.facts[name] for name in _MODEL}
    text = json.dumps([facts, digest_of(_sent(parcel.tensors))], sort_keys=True, separators=(",", ":"))
    return sha256(b"fedpeft-model/1/" + text.encode()).digest()


def _sent(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the constants, whose digest is a fact."""
    return {n: x for n, x in tensors.items() if not n.startswith(("constant/", "fixed/"))}


def _parcel(
    kind: Literal["train", "evaluate"],
    broadcast: Broadcast,
    settings: str,
    base: str,
    constant: frozenset[str],
    in_full: bool,
    parts: tuple[Part, ...],
) -> Parcel:
    task, adapter = broadcast.task, broadcast.adapter
    is_first = task.pass_ == 0
    constants = constants_of(adapter, constant) if is_first else {}
    facts: dict[str, Json] = {
        "settings": settings,
        "base": base,
        "round": task.round,
        "pass": task.pass_,
        "spec": read.describe(task.spec),
        "adapter": read.describe(adapter.spec) if is_first and adapter.spec != task.spec else None,
        "tail": read.describe(Adapter(layers=broadcast.tail).spec) if is_first else [[], []],
        "constants": digest_of(constants) if constants else "",
        "parts": list(parts),
    }
    tensors: dict[str, Tensor] = {f"shared/{n}": x for n, x in task.shared.items()}
    if is_first:
        tensors |= {f"adapter/{n}": x for n, x in narrowed(adapter).items() if n not in constant}
        tensors |= {f"tail/{n}": x for n, x in narrowed_tail(broadcast.tail, adapter).items()}
        tensors |= constants if in_full else {}
    return Parcel(kind, facts, tensors)


def unpack_request(
    content: RecordDict,
    held: Callable[[str], Mapping[str, Tensor] | None],
    restore: Callable[[Mapping[str, Json], dict[str, Tensor], int], Mapping[str, Tensor]] | None = None,
) -> Request:
    """The inverse of ``pack_request``. held: constants by digest, as this node has them, or None; restore: what came as
    a version, where the run has them: from its facts, the message's tensors and the round.

    Raises ConstantsMissing if they are neither held nor brought, and what ``restore`` raises.
    """
    parcel = unpack(content, "train", "evaluate")
    facts, tensors = parcel.facts, dict(parcel.tensors)
    if restore is not None and isinstance(said := facts.get(_VERSION), dict):
        read.exactly(facts, (*_REQUEST, _VERSION))
        tensors |= restore(said, tensors, read.whole(facts, "round"))
    else:
        read.exactly(facts, _REQUEST)
    spec = read.spec_of(facts, "spec")
    task = Task(spec, read.whole(facts, "round"), read.whole(facts, "pass"), read.take_all(tensors, "shared/"))
    _need_floats(task.shared)
    digest, constants, brought = _constants(read.text(facts, "constants"), tensors, held)
    adapter, tail = Adapter(), dict[str, LowRank]()
    if task.pass_ == 0:
        own = spec if facts["adapter"] is None else read.spec_of(facts, "adapter")
        _need_fit(own, spec)
        mine = read.take_all(tensors, "adapter/") | _under(constants, "constant/")
        fixed = _under(constants, "fixed/")
        widen(own, mine, fixed, is_adapter=True)
        adapter = read.adapter_of(own, mine, fixed)
        read.none_left(mine)
        behind, layers = read.spec_of(facts, "tail"), read.take_all(tensors, "tail/")
        widen(behind, layers, fixed, is_adapter=False)
        tail = {x.name: read.low_rank(x, layers, x.name) for x in behind.layers}
        read.none_left(layers)
    read.none_left(tensors)
    return Request(
        read.text(facts, "settings"),
        read.text(facts, "base"),
        Broadcast(task, adapter, tail),
        parts_of(read.texts(facts, "parts"), parcel.kind),
        digest,
        constants,
        brought,
        parcel,
    )


def pack_query(query: Query) -> RecordDict:
    """A request for capabilities."""
    return pack(Parcel("query", {"settings": query.settings, "start": query.start}, {}))


def unpack_query(content: RecordDict) -> Query:
    """The inverse of ``pack_query``."""
    parcel = unpack(content, "query")
    read.exactly(parcel.facts, ("settings", "start"))
    read.none_left(parcel.tensors)
    start = None if parcel.facts["start"] is None else read.whole(parcel.facts, "start")
    return Query(read.text(parcel.facts, "settings"), start)


def settings_of(content: RecordDict) -> str:
    """The settings that any request carries."""
    kind, facts = glance(apart(content)[0])
    if kind not in ("query", "train", "evaluate", "secure"):
        raise ProtocolError(f"the message is a {kind[:40]!r}; want a request")
    if "settings" not in facts:
        raise ProtocolError("the manifest has no settings")
    return read.text(facts, "settings")


def parts_of(names: tuple[str, ...], kind: str) -> tuple[Part, ...]:
    """Names of parts, checked: each once, and some only for a request to evaluate."""
    parts: tuple[Part, ...] = tuple(part for name in names for part in _PARTS if part == name)
    if len(parts) != len(names) or len(set(parts)) != len(parts) or bool(parts) != (kind == "evaluate"):
        want = f"some of {', '.join(_PARTS)}" if kind == "evaluate" else "none"
        raise ProtocolError(f"a request to {kind} has parts {names[:5]}; want {want}")
    return parts


def _constants(
    digest: str, tensors: dict[str, Tensor], held: Callable[[str], Mapping[str, Tensor] | None]
) -> tuple[str, Mapping[str, Tensor], bool]:
    brought = {n: tensors.pop(n) for n in list(tensors) if n.startswith(("constant/", "fixed/"))}
    if brought:
        if digest_of(brought) != digest:
            raise ProtocolError(f"the constants have digest {digest_of(brought)}; want {digest[:64]!r}")
        return digest, brought, True
    if not digest:
        return "", {}, False
    found = held(digest)
    if found is None:
        raise ConstantsMissing(f"the constants {digest[:64]!r} are not held here; send them in full")
    return digest, found, False


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def _need_floats(tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not np.issubdtype(x.dtype, np.floating):
            raise ProtocolError(f"'shared/{name}' is {x.dtype}; want floating-point")


def _need_fit(own: Spec, spec: Spec) -> None:
    """A client's adapter has the server's layers, at the server's ranks or smaller ones."""
    mine = [(x.name, x.d, x.k) for x in own.layers]
    if mine != [(x.name, x.d, x.k) for x in spec.layers] or own.dense != spec.dense:
        raise ProtocolError("the adapter's layers and leaves are not those of the round's spec")
    if any(x.rank > y.rank for x, y in zip(own.layers, spec.layers, strict=True)):
        raise ProtocolError("the adapter has a larger rank than the round's spec")
