"""Versions of what clients are sent to train on: the change since the one that a client holds, coded, or all of it.

Both sides add the same coded change to the same tensors, so that they have the same to the last bit: what a client
trains on, and what its change is against. The server codes the next change against that, and not against what it would
have liked to send, so that what one change leaves out is in the next, and nothing drifts. Clients of one rank have the
same versions, whoever was asked when; one that has missed a few is sent the changes since then, one after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedpeft.adapters import Layout
from fedpeft.channel import Codec, Coded, Coding
from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.packing import Json, Tensor, digest_of
from fedpeft.flower.store import ClientStore

LONGEST = 3
"""Changes in a row that are sent before it is the whole version instead."""
_SOURCE = "source"
_STEP = ("before", "names")
_VERSION = ("digest", "rank", "steps")


class VersionMissing(ProtocolError):  # noqa: N818
    """The message has the change of a version that this node doesn't hold: it needs the whole one."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The change from one version to the next. before: the digest of the one; names: of the tensors whose change is
    coded, in order; fresh: the others, of which there was none of this shape."""

    before: str
    names: tuple[str, ...]
    coded: Coded
    fresh: Mapping[str, Tensor]

    def over(self, tensors: Mapping[str, Tensor], codec: Codec) -> dict[str, Tensor]:
        """The next version's tensors, from those of the one. Raises ProtocolError where they do not fit."""
        wrong = [n for n in self.names if n not in tensors or self.names.count(n) > 1]
        if wrong:
            raise ProtocolError(f"the change is of {wrong[0][:80]!r}, twice or without one in the version before")
        layout = _layout(tensors, self.names)
        change = Coding(codec, layout).decode(self.coded)
        if len(change) != layout.size:
            raise ProtocolError(f"the change has {len(change)} numbers; want {layout.size}")
        return layout.unflatten(layout.flatten({n: tensors[n] for n in self.names}) + change) | dict(self.fresh)

    @property
    def nbytes(self) -> int:
        return len(self.coded.codes) + self.coded.rest.nbytes + sum(x.nbytes for x in self.fresh.values())


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """What clients of one rank have in a round.

    digest: of ``tensors``; source: the digest of what the server would have sent in full; steps: how it came about,
    the newest last.
    """

    rank: int
    digest: str
    source: str
    tensors: Mapping[str, Tensor]
    steps: tuple[Step, ...] = ()

    def since(self, digest: str) -> tuple[Step, ...] | None:
        """What a client that holds the version of this digest needs; None if that is no less than all of this one."""
        if digest == self.digest:
            return ()
        whole = sum(x.nbytes for x in self.tensors.values())
        for at, step in enumerate(self.steps):
            if step.before == digest:
                return self.steps[at:] if sum(x.nbytes for x in self.steps[at:]) < whole else None
        return None


@dataclass(slots=True, eq=False)
class Versions:
    """The server's side: the newest version of each rank, and which one each client is known to hold.

    store: where the versions outlive the process, so that a run that is taken up again goes on from the same ones. Who
    holds what is known to one process alone: the next one begins with whole versions.
    """

    codec: Codec
    store: ClientStore
    _newest: dict[int, Version] = field(default_factory=dict, init=False)
    _held: dict[tuple[int, int], str] = field(default_factory=dict, init=False)

    def of(self, rank: int, round: int, tensors: Mapping[str, Tensor]) -> Version:
        """The version with which clients of this rank have these tensors, as nearly as the codec tells."""
        source = digest_of(tensors)
        last = self._newest.get(rank) or self._kept(rank, round)
        if last is None or last.source != source:
            last = self._newest[rank] = self._next(last, rank, source, tensors)
            said = {_SOURCE: np.frombuffer(source.encode(), np.uint8)}
            self.store.save(_place(rank), round, {**last.tensors, **said})
        self._newest[rank] = last
        return last

    def holds(self, client: int, rank: int) -> str:
        """The digest of the version of this rank that a client holds; "" if it is not known to hold one."""
        return self._held.get((client, rank), "")

    def hold(self, client: int, rank: int, digest: str) -> None:
        """A client was found to hold this version."""
        self._held[client, rank] = digest

    def _next(self, last: Version | None, rank: int, source: str, tensors: Mapping[str, Tensor]) -> Version:
        if last is not None:
            had = last.tensors
            names = tuple(sorted(n for n, x in tensors.items() if n in had and had[n].shape == x.shape))
            layout = _layout(tensors, names)
            now, before = (layout.flatten({n: x[n] for n in names}) for x in (tensors, had))
            coded = Coding(self.codec, layout).encode((now - before).astype(np.float32), None)
            step = Step(last.digest, names, coded, {n: x for n, x in tensors.items() if n not in names})
            after = step.over(had, self.codec)
            if all(np.isfinite(x).all() for x in after.values()):
                return Version(rank, digest_of(after), source, after, (*last.steps, step)[-LONGEST:])
        return Version(rank, source, source, dict(tensors))

    def _kept(self, rank: int, round: int) -> Version | None:
        found = dict(self.store.load(_place(rank), round + 1) or {})
        if _SOURCE not in found:
            return None
        source = found.pop(_SOURCE).tobytes().decode()
        return Version(rank, digest_of(found), source, found)


def packed(version: Version, steps: tuple[Step, ...] | None) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """A version as facts and tensors of a request: by these steps, or whole."""
    said: list[Json] = []
    tensors: dict[str, Tensor] = dict(version.tensors) if steps is None else {}
    for i, step in enumerate(steps or ()):
        said.append({"before": step.before, "names": list(step.names)})
        tensors[f"step/{i}/codes"] = np.frombuffer(step.coded.codes, np.uint8)
        tensors[f"step/{i}/rest"] = step.coded.rest
        tensors |= {f"step/{i}/fresh/{n}": x for n, x in step.fresh.items()}
    return {"digest": version.digest, "rank": version.rank, "steps": None if steps is None else said}, tensors


@dataclass(frozen=True, slots=True)
class Held:
    """A client's side: the newest version of each rank that it has been sent."""

    codec: Codec
    store: ClientStore

    def restore(self, said: Mapping[str, Json], tensors: dict[str, Tensor], round: int) -> Mapping[str, Tensor]:
        """The tensors of the version that came; what it came as is taken out of ``tensors``, and kept.

        Raises VersionMissing where it came as the change of another than the one that is held.
        """
        read.exactly(said, _VERSION)
        digest, place = read.text(said, "digest"), _place(read.whole(said, "rank"))
        held = self.store.load(place, round + 1) or {}
        has = digest_of(held)
        steps = said["steps"]
        found = is_moving(tensors) if steps is None else self._stepped(held, has, digest, _steps(steps, tensors))
        if (actual := digest_of(found)) != digest:
            raise ProtocolError(f"the version has digest {actual}; want {digest[:64]!r}")
        if has != digest:
            self.store.save(place, round, found)
        return found

    def _stepped(self, held: Mapping[str, Tensor], has: str, digest: str, steps: list[Step]) -> Mapping[str, Tensor]:
        if has == digest:
            return held
        begin = next((i for i, step in enumerate(steps) if step.before == has), None)
        if begin is None:
            raise VersionMissing(f"the version before {digest[:64]!r} is not held here; send it whole")
        for step in steps[begin:]:
            held = step.over(held, self.codec)
        return held


def is_moving(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a request's tensors those that versions are of: what is trained and what runs beside it, in fp32."""
    return {n: x for n, x in tensors.items() if n.startswith(("adapter/", "tail/")) and x.dtype == np.float32}


def _steps(said: Json, tensors: dict[str, Tensor]) -> list[Step]:
    if not isinstance(said, list):
        raise ProtocolError(f"steps is {str(said)[:60]!r}; want a list")
    steps: list[Step] = []
    for i, row in enumerate(said):
        if not isinstance(row, dict):
            raise ProtocolError(f"a step is {str(row)[:60]!r}; want an object")
        read.exactly(row, _STEP)
        mine = read.take_all(tensors, f"step/{i}/")
        codes, rest, fresh = mine.pop("codes", None), mine.pop("rest", None), read.take_all(mine, "fresh/")
        if codes is None or codes.dtype != np.uint8 or rest is None or rest.dtype != np.float32 or rest.ndim != 1:
            raise ProtocolError("a step holds no codes, or no fp32 vector beside them")
        read.none_left(mine)
        steps.append(Step(read.text(row, "before"), read.texts(row, "names"), Coded(codes.tobytes(), rest), fresh))
    return steps


def _layout(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> Layout:
    return Layout(tuple((n, tensors[n].shape) for n in names))


def _place(rank: int) -> int:
    """Where the store keeps versions of this rank: it has none but clients, whose numbers are from 0 on."""
    return -1 - rank
