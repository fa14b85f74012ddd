"""How long a run would take in simulated time: its schedule, worked out without training anybody."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedpeft.config import Experiment
from fedpeft.rounds import Buffered, Errand, Population, Visit, derive, draw
from fedpeft.run.virtual import Work, assigned, population
from fedpeft.run.workshop import Workshop

_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Pace:
    """One kind of device. clients: how many are on it; tokens: trained on in a second; seconds: from a message to its
    answer, the median over its clients while they are there; problem: why it can't train, or "".
    """

    name: str
    clients: int
    tokens: float
    seconds: float
    problem: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """paces: of each kind of device; round_seconds: the median time from one round, or step, to the next."""

    paces: tuple[Pace, ...]
    round_seconds: float

    def lines(self) -> list[tuple[str, str]]:
        """What it says, as (name, text) pairs to print."""
        told = [
            (
                x.name,
                x.problem or f"{x.clients} clients, {x.tokens:,.0f} tokens/s, {x.seconds:,.1f} s to answer (median)",
            )
            for x in self.paces
        ]
        return [*told, ("simulated", f"about {self.round_seconds:,.0f} seconds a round or step")]


def outlook(found: Experiment, here: Workshop, down: Callable[[int], float]) -> Outlook:
    """The outlook of a simulated run over its first 20 rounds. down: bytes that a client of a rank fetches in one."""
    people, work, ranks = population(found, here), Work(found, here), assigned(found, here)
    clients = here.federation.clients

    def errand(client: int) -> Errand:
        return work.errand(people, client, 0, 0, down(ranks(client, 0)))

    paces = []
    for kind, name in enumerate(people.names):
        mine = [c for c in range(clients) if people.kinds[c] == kind]
        times = [people.duration(c, 0, errand(c)) for c in mine]
        problem = next((x for c in mine if (x := errand(c).problem)), "")
        paces.append(Pace(name, len(mine), people.speeds[kind], float(np.median(times)) if times else 0.0, problem))
    buffered = isinstance(found.schedule, Buffered)
    ends = _steps(found, people, errand, clients) if buffered else _rounds(found, people, errand, clients)
    return Outlook(tuple(paces), float(np.median(np.diff([0.0, *ends]))) if ends else float("inf"))


@dataclass(slots=True)
class _Devices:
    """Who is busy until when."""

    people: Population
    errand: Callable[[int], Errand]
    deadline: float
    free: dict[int, float]

    def visit(self, client: int, round: int, now: float) -> Visit:
        errand = self.errand(client)
        visit = self.people.visit(client, round, errand, now, self.free.get(client, 0.0), now + self.deadline)
        if visit.fate != "away":
            self.free[client] = visit.ended
        return visit

    def comes(self, visit: Visit) -> bool:
        """Whether an answer comes, and one that counts."""
        return visit.fate == "done" and not self.errand(visit.client).problem


def _rounds(found: Experiment, people: Population, errand: Callable[[int], Errand], clients: int) -> list[float]:
    """When each of the first rounds ends."""
    selection = found.selection
    devices = _Devices(people, errand, selection.deadline, {})
    enough = selection.wanted(clients) if selection.over else clients
    now, ends = 0.0, []
    for round in range(_ROUNDS):
        visits = [devices.visit(c, round, now) for c in selection.choose(range(clients), found.seed, round)]
        arrivals = sorted(v.ended for v in visits if devices.comes(v))
        if len(arrivals) >= enough:
            now = arrivals[enough - 1]
        elif all(v.fate == "done" for v in visits):
            now = max(v.ended for v in visits)
        else:
            now += selection.deadline
        ends.append(now)
    return ends


def _steps(found: Experiment, people: Population, errand: Callable[[int], Errand], clients: int) -> list[float]:
    """When the server takes each of its first steps; fewer than 20 if nobody is left to ask."""
    terms = found.schedule
    assert isinstance(terms, Buffered)
    devices = _Devices(people, errand, found.selection.deadline, {})
    events: list[tuple[float, int, int, bool]] = []
    at_work: dict[int, tuple[int, int]] = {}
    asked: set[int] = set()
    now, draws, answers, count = 0.0, 0, 0, 0
    ends: list[float] = []
    while len(ends) < _ROUNDS:
        while (room := terms.concurrency - len(at_work)) > 0:
            seed = derive(found.seed, "select", len(ends), draws)
            chosen, draws = draw(range(clients), room, seed, asked | set(at_work)), draws + 1
            if not chosen:
                break
            for client in chosen:
                visit = devices.visit(client, len(ends), now)
                count += 1
                at_work[client] = (count, len(ends))
                asked.add(client)
                until = visit.ended if visit.fate == "done" else now + devices.deadline
                heapq.heappush(events, (until, count, client, devices.comes(visit)))
        if not events:
            return ends
        now, number, client, comes = heapq.heappop(events)
        if at_work.get(client, (0, 0))[0] != number:
            continue
        del at_work[client]
        answers += comes
        if answers == terms.buffer:
            ends.append(now)
            answers, asked = 0, set()
            at_work = {c: x for c, x in at_work.items() if len(ends) - x[1] <= terms.max_staleness}
    return ends
