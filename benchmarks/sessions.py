"""One session of secure aggregation in one process, timed phase by phase: what benchmarks/secagg.py runs.

Run: python benchmarks/sessions.py "full, 20" [part of its numbers]
"""

import json
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np

from fedpeft.secagg import finish
from fedpeft.secagg.encoding import digest
from fedpeft.secagg.full import Full, KRegular
from fedpeft.secagg.identity import Identity
from fedpeft.secagg.masks import Mask
from fedpeft.secagg.params import Params, hash_models
from fedpeft.secagg.protocol import Ring, Vectors
from fedpeft.secagg.roster import Member, Roster
from fedpeft.secagg.terms import Expected, History, Policy


@dataclass(frozen=True, slots=True)
class Case:
    """clients: of whom ``lost`` vanish before they send a vector; numbers: of a vector; m, bits: of the ring, and of a
    number. How many neighbours and shares there are is what the protocol says."""

    protocol: Full | KRegular
    clients: int
    numbers: int
    lost: int
    m: int = 32
    bits: int = 20


CASES = {
    "full, 20": Case(Full(), 20, 1_000_000, 4),
    "full, 100": Case(Full(), 100, 100_000, 10),
    "kregular, 100": Case(KRegular(), 100, 100_000, 5, m=24, bits=17),
    "kregular, 1000": Case(KRegular(), 1000, 100_000, 100),
    "full, 300": Case(Full(), 300, 100_000, 30),
}
MODEL = digest("benchmark", b"model")


@dataclass(slots=True)
class Given(Vectors):
    """A client's surroundings: a vector that is there already."""

    ready: Ring

    def model_hash(self) -> bytes:
        return MODEL

    def vector(self, pass_: int) -> Ring:
        return self.ready


@contextmanager
def clocked(spent: dict[str, float], name: str) -> Iterator[None]:
    """Seconds within, added to what was spent under this name."""
    at = perf_counter()
    yield
    spent[name] += perf_counter() - at


def session(case: Case) -> dict[str, Any]:
    """One session's times and bytes; AssertionError unless the sum is exact."""
    identities = sorted(
        (Identity.of(digest("benchmark", bytes([i >> 8, i & 255]))) for i in range(case.clients)), key=lambda x: x.id
    )
    roster = Roster(tuple(Member(x.id) for x in identities))
    params = _params(case, identities)
    expected = Expected(
        params.layout_hash, params.dims, params.range, "", params.bits, params.weighting, None, params.base
    )
    clients = {x.id: case.protocol.client(x, roster, Policy(), History(), expected) for x in identities}
    lost = {x.id for x in identities[3 :: case.clients // case.lost][: case.lost]}
    rng = np.random.default_rng(0)
    states, up = dict.fromkeys(clients, b""), 0
    want = np.zeros(case.numbers, np.uint32)
    spent: dict[str, float] = defaultdict(float)
    asked: dict[str, int] = defaultdict(int)
    server, nothing = case.protocol.server(params, roster), np.zeros(0, np.uint32)
    while not server.is_over:
        phase = server.phase.name
        with clocked(spent, "server"):
            outbox = server.outbox()
        for id_, message in outbox.items():
            vector = nothing
            if phase == "vectors":
                if id_ in lost:
                    server.drop(id_)
                    continue
                vector = rng.integers(0, 2**case.m, case.numbers, np.uint32, endpoint=False)
                want += vector
            with clocked(spent, phase):
                step = clients[id_].answer(states[id_], message, Given(vector), os.urandom)
            assert not step.was_refused, (phase, step.answer)
            asked[phase] += 1
            states[id_], up = step.state, up + len(step.answer)
            with clocked(spent, "server"):
                server.receive(id_, step.answer)
        with _finishing(spent) as masks, clocked(spent, "finish" if phase == "unmask" else "server"):
            server.close()
    assert server.total is not None
    np.testing.assert_array_equal(server.total, want & np.uint32(2**case.m - 1))
    assert len(server.survivors) == case.clients - case.lost
    each = {phase: 1000 * spent[phase] / count for phase, count in asked.items()}
    return {
        "clients": case.clients,
        "neighbours": params.k,
        "threshold": params.t,
        "lost": case.lost,
        "numbers": case.numbers,
        "bits": case.m,
        "a client's keys, ms": each["keys"],
        "its shares, ms": each["shares"],
        "its masks, ms": each["vectors"],
        "its survivors and unmasking, ms": each["survivors"] + each["unmask"],
        "its bytes up": up // case.clients,
        "server until the end, s": spent["server"],
        "server combining, s": spent["combine"],
        "server unmasking, s": spent["finish"] - spent["combine"],
        "masks taken off": sum(masks),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _params(case: Case, identities: list[Identity]) -> Params:
    models = {"0": MODEL.hex()}
    return Params(
        v=1,
        suite="full" if isinstance(case.protocol, Full) else "kregular",
        consistency=True,
        run_id="benchmark",
        fl_round=0,
        attempt=0,
        session=os.urandom(16).hex(),
        n=case.clients,
        t=case.protocol.threshold(case.clients),
        k=case.protocol.degree(case.clients),
        m=case.m,
        bits=case.bits,
        range="4",
        clip="",
        dims=(case.numbers,),
        layout_hash=digest("benchmark", b"layout").hex(),
        model_hash=hash_models(models).hex(),
        models=models,
        base="benchmark",
        weighting="1",
        cohort=tuple(x.id.hex() for x in identities),
    )


@contextmanager
def _finishing(spent: dict[str, float]) -> Iterator[list[int]]:
    """Clocks within the server's last step: secrets from shares under "combine"; and how many masks come off."""
    combine, add_masks = finish.combine, finish.add_masks
    counts: list[int] = []

    def timed_combine(*arguments: Any) -> bytes:
        with clocked(spent, "combine"):
            return combine(*arguments)

    def counted_masks(total: Ring, masks: Sequence[Mask]) -> None:
        counts.append(len(masks))
        add_masks(total, masks)

    finish.combine, finish.add_masks = timed_combine, counted_masks
    try:
        yield counts
    finally:
        finish.combine, finish.add_masks = combine, add_masks


def main() -> None:
    case = CASES[sys.argv[1]]
    part = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    print(json.dumps({"session": sys.argv[1]} | session(replace(case, numbers=int(case.numbers * part)))))


if __name__ == "__main__":
    main()
