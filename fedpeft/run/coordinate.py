"""The coordinator's loop: meet the nodes, drive round after round, evaluate, keep what it takes to go on."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from fedpeft.adapters import Adapter
from fedpeft.config import Experiment
from fedpeft.errors import ProtocolError
from fedpeft.flower import Evaluation, Fleet, Flow, Grid, Part, Registry, Traffic, VirtualGrid, drive, evaluate, muster
from fedpeft.report import (
    FLEET,
    FinalRecord,
    Json,
    MemoryRecord,
    RoundRecord,
    RunFolder,
    Score,
    Scores,
    SecureRecord,
    history,
    settled,
)
from fedpeft.rounds import ListRound, Metrics, Outcome, Round, SecureRound, SumRound
from fedpeft.rules import ListRule, ServerState, Task
from fedpeft.run.compression import check_compression, compressed
from fedpeft.run.panel import panel
from fedpeft.run.ranks import Assigned, check_clients, check_spec
from fedpeft.run.secure import Sessions, check_ranks
from fedpeft.run.view import View
from fedpeft.run.virtual import flow_of, recall, remembered

_LOOKED_AT = 10_000
"""Clients whose ranks are looked at before a run begins."""


@dataclass(frozen=True, slots=True, eq=False)
class _Training:
    """What came of asking clients to train: their outcome, or why there is none, and the state to go on from."""

    state: ServerState
    asked: tuple[int, ...]
    outcome: Outcome | None
    refused: tuple[tuple[int, str], ...]
    traffic: Traffic
    secure: SecureRecord | None = None


@dataclass(frozen=True, slots=True)
class Coordinator:
    """One run, on whatever carries the messages. Its state is in the folder, so that another process can go on.

    time: the grid itself, where it has a clock of its own; said: the ranks of clients that say their own, where that
    is known before they are asked; sessions: of secure aggregation, None for a run in the clear; weigh: the memory of
    devices, asked at the end.
    """

    found: Experiment
    folder: RunFolder
    view: View
    time: VirtualGrid | None = None
    said: Callable[[int], int | None] | None = None
    sessions: Sessions | None = None
    weigh: Callable[[Fleet], MemoryRecord | None] | None = None

    def run(self, grid: Grid, clients: int) -> Adapter:
        """Do all rounds that the last checkpoint leaves to be done; the adapter that training began with.

        Raises ProtocolError where the nodes do not suffice, or too many rounds in a row fail.
        """
        found = self.found
        check_clients(found, clients, None if self.sessions is None else self.sessions.policy)
        patience = found.selection.deadline
        clock, sleep = (time.monotonic, time.sleep) if self.time is None else (self.time.clock, self.time.sleep)
        registry = Registry(self.folder.path / FLEET)
        fleet = muster(
            *(grid, found.rule, found.settings_json, clients, found.fleet.wait, True, clock, sleep, patience, registry),
            identified=self.sessions is not None,
            least=found.selection.least(clients),
        )
        for why in fleet.refused:
            self.view.note(why)
        if len(fleet.nodes) < clients:
            absent = list(islice((c for c in range(clients) if c not in fleet.nodes), 10))
            self.view.note(
                f"beginning with {len(fleet.nodes)} of {clients} clients: "
                f"{', '.join(map(str, absent[:9]))}{', …' if len(absent) > 9 else ''} can't take part, or did not come "
                f"within {found.fleet.wait:g} seconds (fleet.wait); who comes later takes part from then on"
            )
        least = found.selection.least(clients)
        if len(fleet.nodes) < least:
            raise ProtocolError(f"too few nodes: got {len(fleet.nodes)}; want at least {least} of {clients}")
        if fleet.start is None:
            raise ProtocolError("no node gave the adapter to start from")
        check_spec(found, fleet.start.spec)
        check_compression(found, fleet.start.spec)
        start, said = fleet.start, self.said or registry.rank
        fleet = replace(fleet, rank=Assigned(found.ranks, clients, found.seed, said))
        check_ranks(found, {fleet.rank(client, 0) for client in islice(fleet.clients(), _LOOKED_AT)}, start.spec)
        fleet = compressed(fleet, found, self.folder.path)
        state, extras = self._begin(start)
        registry.rewind(state.task.round)
        flow = flow_of(found, fleet, state, lambda client, problem: self.view.advance())
        recall(self.time, flow, extras, self.folder.checkpoints)
        failures = 0
        self.view.begin(found.rounds - state.task.round)
        while state.task.round < found.rounds:
            state, did = self._round(fleet, flow, state)
            failures = 0 if did else failures + 1
            if failures == found.fleet.failures:
                raise ProtocolError(
                    f"{failures} rounds in a row had too few answers; see {self.folder.metrics} for the reasons, "
                    f"and selection.quorum, selection.deadline, fleet.failures for the limits"
                )
        if history(self.folder.path).final is None:
            self._end(fleet, state)
        return start

    def _begin(self, start: Adapter) -> tuple[ServerState, Mapping[str, Json]]:
        """The state to go on from: the last checkpoint's, or else the start, which becomes the first checkpoint."""
        checkpoints = self.folder.checkpoints
        if not checkpoints.files():
            state = ServerState(Task(start.spec), start)
            checkpoints.save(state, {})
            return settled(state), {}
        last = checkpoints.load()
        for damage in last.damaged:
            self.view.note(f"{damage}: going on from {last.path.name}, which is whole")
        if last.state.task.round:
            self.view.note(f"going on after round {last.state.task.round}")
        if last.state.task.round < self.found.rounds:
            self.folder.rewind(last.state.task.round)
        return last.state, last.extras

    def _round(self, fleet: Fleet, flow: Flow | None, state: ServerState) -> tuple[ServerState, bool]:
        """One round, or one step of a buffered run: its next state, on disk, and whether enough clients answered."""
        found, number = self.found, state.task.round + 1
        started, began = time.time(), time.monotonic()
        least = found.selection.least(fleet.known)
        for news in fleet.meet(least, found.fleet.wait):
            self.view.note(news)
        did = self._train(fleet, state) if flow is None else self._fill(flow, state)
        did, trained = replace(did, traffic=did.traffic.then(fleet.beside(), 0.0)), time.monotonic() - began
        survivors = did.outcome.survivors if did.outcome else ()
        fleet.registry.record(number - 1, did.asked, survivors, {c for c, _ in did.refused}, did.traffic.each)
        state, refused, outcome = settled(did.state), did.refused, did.outcome
        if flow is not None:
            flow.buffer.state = state
        scores = None
        if number % found.evaluation.every == 0 or number == found.rounds:
            scores = self._evaluate(fleet, state, "validation", f"round {number}: evaluation")
            refused += tuple((client, f"evaluation: {reason}") for client, reason in scores.refused)
        record = RoundRecord(
            round=number,
            asked=did.asked,
            survivors=survivors,
            refused=refused,
            train=Score.of(outcome.metrics) if outcome else None,
            validation=_clients(scores, "validation"),
            central=_central(scores),
            bytes_up=did.traffic.bytes_up,
            bytes_down=did.traffic.bytes_down,
            seconds=time.monotonic() - began,
            seconds_training=trained,
            timeline=did.traffic.timeline if self.time is None else (),
            started=started,
            staleness=outcome.staleness if outcome else (),
            exactness=outcome.exactness if outcome else None,
            simulated=self.time.clock() if self.time else None,
            visits=self.time.take_visits() if self.time else (),
            secure=did.secure,
        )
        # The record first: a record without its checkpoint is dropped on resume, a checkpoint without its
        # record would leave a hole.
        self.folder.append(record)
        if outcome is not None:  # else a resumed run does the round over
            oldest = min(flow.buffer.at_work.values(), default=number) if flow else number
            checkpoints = replace(self.folder.checkpoints, keep=2 + number - oldest)
            checkpoints.save(state, remembered(self.time, flow))
        self.view.round(record, found.rounds)
        return state, outcome is not None

    def _train(self, fleet: Fleet, state: ServerState) -> _Training:
        found = self.found
        number = state.task.round
        resting = fleet.registry.since(number - found.selection.rest) if found.selection.rest else ()
        cohort = found.selection.choose(fleet.clients(), found.seed, number, fleet.known, resting)
        self.view.work(f"round {number + 1}: training", len(cohort))
        ranks = {client: fleet.rank(client, number) for client in cohort}
        refused, traffic, secure = tuple[tuple[int, str], ...](), Traffic(), None
        try:
            round, traffic, secure = self._drive(fleet, state, ranks)
            refused = tuple(round.refused)
            outcome = round.result()
        except ProtocolError as error:  # too few answers, or too few for a session to begin
            if number < found.rule.fewest_rounds - 1:
                raise ProtocolError(
                    f"round {number + 1}: {error}. {found.settings['rule']['name']} finds its directions in the first "
                    f"{found.rule.fewest_rounds - 1} rounds, and none can be left out: resume the run, which begins "
                    f"with this one (selection.quorum and selection.deadline are the limits)"
                ) from error
            self.view.note(f"round {number + 1} is left out: {error}")
            return _Training(state.next(state.adapter), cohort, None, refused, traffic, secure)
        return _Training(outcome.state, cohort, outcome, refused, traffic, secure)

    def _drive(
        self, fleet: Fleet, state: ServerState, ranks: Mapping[int, int]
    ) -> tuple[Round | SecureRound, Traffic, SecureRecord | None]:
        """A round of these clients, by rank, run to its end."""

        def told(client: int, problem: str | None) -> None:
            self.view.advance()

        if self.sessions is not None:
            return self.sessions.drive(fleet, state, ranks, fleet.known, told)
        round = self._open(state, ranks, fleet.known)
        return round, drive(fleet, round, self.found.selection.deadline, told), None

    def _fill(self, flow: Flow, state: ServerState) -> _Training:
        self.view.work(f"step {state.task.round + 1}: training", flow.buffer.terms.buffer)
        asked, traffic = flow.fill()
        try:
            outcome = flow.buffer.step()
        except ProtocolError as error:
            self.view.note(f"step {state.task.round + 1} is left out: {error}")
            return _Training(flow.buffer.state, asked, None, flow.buffer.take_refused(), traffic)
        return _Training(outcome.state, asked, outcome, outcome.refused, traffic)

    def _open(self, state: ServerState, ranks: Mapping[int, int], clients: int) -> Round:
        found = self.found
        quorum = found.selection.least(clients)
        enough = found.selection.wanted(clients) if found.selection.over else None
        largest, measures = found.weighting.largest, found.evaluation.exactness
        if isinstance(found.rule, ListRule):
            return ListRound(state, ranks, quorum, found.plain, enough, largest, rule=found.rule, exactness=measures)
        return SumRound(
            *(state, ranks, quorum, found.plain, enough, largest),
            rule=found.rule,
            optimiser=found.server,
            exactness=measures,
            clients=clients,
        )

    def _evaluate(self, fleet: Fleet, state: ServerState, part: Part, what: str) -> Evaluation:
        """The clients on their own rows, or as many as ``evaluation.sample`` of them, and one node on the central test
        set, as far as the experiment asks."""
        round = state.task.round if part == "validation" else None
        own = panel(self.found, fleet.clients(), round) if self.found.evaluation.clients else ()
        asked: dict[int, list[Part]] = {c: [part] for c in own}
        central = fleet.central
        is_shared = part != "tuned" and not self._is_personal(state)
        if self.found.evaluation.central and central is not None and is_shared:
            asked.setdefault(central, []).append("central")
        self.view.work(what, len(asked))
        deadline = self.found.selection.deadline
        last = max(0, state.task.round - 1)  # the round that is over, where ranks are drawn anew
        ranks = {client: fleet.rank(client, last) for client in asked}
        return evaluate(fleet, state, ranks, asked, deadline, lambda client, problem: self.view.advance())

    def _is_personal(self, state: ServerState) -> bool:
        """Whether the shared adapter is only a part of each client's, so that by itself it says nothing."""
        return bool(self.found.rule.personal(state.task.spec))

    def _end(self, fleet: Fleet, state: ServerState) -> None:
        scores, tuned = self._evaluate(fleet, state, "test", "test"), None
        if self.found.personal.finetune:
            tuned = self._evaluate(fleet, state, "tuned", "each client for itself")
        for client, reason in scores.refused + (tuned.refused if tuned else ()):
            self.view.note(f"client {client} could not be evaluated: {reason}")
        done = history(self.folder.path)
        if self.weigh is not None and done.memory is None and (memory := self.weigh(fleet)) is not None:
            self.folder.append(memory)
        self.folder.append(
            FinalRecord(
                rounds=state.task.round,
                central=_central(scores),
                test=_clients(scores, "test"),
                seconds=done.seconds,
                adapter_digest=state.digest,
                bytes_up=done.bytes_up,
                bytes_down=done.bytes_down,
                tuned=_clients(tuned, "tuned"),
            )
        )


def _clients(scores: Evaluation | None, part: Part) -> Scores | None:
    if scores is None:
        return None
    each: Mapping[int, Metrics] = {c: x[part] for c, x in scores.answers.items() if part in x and x[part].units}
    return Scores.of(each) if each else None


def _central(scores: Evaluation | None) -> Score | None:
    if scores is None:
        return None
    return next((Score.of(x["central"]) for x in scores.answers.values() if "central" in x), None)
