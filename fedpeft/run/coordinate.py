"""The coordinator's loop: meet the nodes, drive round after round, evaluate, keep what it takes to go on."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft.adapters import Adapter
from fedpeft.config import Experiment
from fedpeft.errors import ProtocolError
from fedpeft.flower import Evaluation, Fleet, Grid, Part, drive, evaluate, muster
from fedpeft.report import FinalRecord, RoundRecord, RunFolder, Score, Scores, history, settled
from fedpeft.rounds import ListRound, Metrics, Round, SumRound
from fedpeft.rules import ListRule, ServerState, Task
from fedpeft.run.view import View

WHOLE = 1 << 30
"""A rank that no layer reaches: the client holds all directions that the server does."""


@dataclass(frozen=True, slots=True)
class Coordinator:
    """One run, on whatever carries the messages. Its state is in the folder, so that another process can go on."""

    found: Experiment
    folder: RunFolder
    view: View

    def run(self, grid: Grid, clients: int) -> Adapter:
        """Do all rounds that the last checkpoint leaves to be done; the adapter that training began with.

        Raises ProtocolError where the nodes do not suffice, or too many rounds in a row fail.
        """
        found = self.found
        patience = found.selection.deadline
        fleet = muster(grid, found.rule, found.settings_json, clients, found.fleet.wait, patience=patience)
        for why in fleet.refused:
            self.view.note(why)
        if len(fleet.nodes) < clients:
            absent = [c for c in range(clients) if c not in fleet.nodes]
            self.view.note(
                f"going on with {len(fleet.nodes)} of {clients} clients, for this process's whole run: "
                f"{', '.join(map(str, absent[:9]))}{', …' if len(absent) > 9 else ''} can't take part, or did not come "
                f"within {found.fleet.wait:g} seconds (fleet.wait)"
            )
        least = found.selection.least(clients)
        if len(fleet.nodes) < least:
            raise ProtocolError(f"too few nodes: got {len(fleet.nodes)}; want at least {least} of {clients}")
        if fleet.start is None:
            raise ProtocolError("no node gave the adapter to start from")
        state = self._begin(fleet.start)
        failures = 0
        self.view.begin(found.rounds - state.task.round)
        while state.task.round < found.rounds:
            state, did = self._round(fleet, state)
            failures = 0 if did else failures + 1
            if failures == found.fleet.failures:
                raise ProtocolError(
                    f"{failures} rounds in a row had too few answers; see {self.folder.metrics} for the reasons, "
                    f"and selection.quorum, selection.deadline, fleet.failures for the limits"
                )
        if history(self.folder.path).final is None:
            self._end(fleet, state)
        return fleet.start

    def _begin(self, start: Adapter) -> ServerState:
        """The state to go on from: the last checkpoint's, or else the start, which becomes the first checkpoint."""
        checkpoints = self.folder.checkpoints
        if not checkpoints.files():
            state = ServerState(Task(start.spec), start)
            checkpoints.save(state, {})
            return settled(state)
        last = checkpoints.load()
        for damage in last.damaged:
            self.view.note(f"{damage}: going on from {last.path.name}, which is whole")
        if last.state.task.round:
            self.view.note(f"going on after round {last.state.task.round}")
        if last.state.task.round < self.found.rounds:
            self.folder.rewind(last.state.task.round)
        return last.state

    def _round(self, fleet: Fleet, state: ServerState) -> tuple[ServerState, bool]:
        """One round: its next state, on disk, and whether enough clients answered."""
        found, number = self.found, state.task.round + 1
        started, began = time.time(), time.monotonic()
        cohort = found.selection.choose(sorted(fleet.nodes), found.seed, state.task.round)
        self.view.work(f"round {number}: training", len(cohort))
        round = self._open(state, cohort, len(fleet.nodes))
        traffic = drive(fleet, round, found.selection.deadline, lambda client, problem: self.view.advance())
        trained = time.monotonic() - began
        refused, train = tuple(round.refused), None
        survivors: tuple[int, ...] = ()
        try:
            outcome = round.result()
        except ProtocolError as error:
            self.view.note(f"round {number} is left out: {error}")
            state = state.next(state.adapter)
        else:
            state, survivors, train = outcome.state, outcome.survivors, Score.of(outcome.metrics)
        state = settled(state)
        scores = None
        if number % found.evaluation.every == 0 or number == found.rounds:
            scores = self._evaluate(fleet, state, "validation", f"round {number}: evaluation")
            refused += tuple((client, f"evaluation: {reason}") for client, reason in scores.refused)
        record = RoundRecord(
            round=number,
            asked=cohort,
            survivors=survivors,
            refused=refused,
            train=train,
            validation=_clients(scores, "validation"),
            central=_central(scores),
            bytes_up=traffic.bytes_up,
            bytes_down=traffic.bytes_down,
            seconds=time.monotonic() - began,
            seconds_training=trained,
            timeline=traffic.timeline,
            started=started,
        )
        # The record first: a record without its checkpoint is dropped on resume, a checkpoint without its
        # record would leave a hole.
        self.folder.append(record)
        if train is not None:  # else a resumed run does the round over
            self.folder.checkpoints.save(state, {})
        self.view.round(record, found.rounds)
        return state, train is not None

    def _open(self, state: ServerState, cohort: Sequence[int], clients: int) -> Round:
        found = self.found
        ranks = dict.fromkeys(cohort, WHOLE)
        quorum = found.selection.least(clients)
        enough = found.selection.wanted(clients) if found.selection.over else None
        largest = found.weighting.largest
        if isinstance(found.rule, ListRule):
            return ListRound(state, ranks, quorum, found.channel, enough, largest, rule=found.rule)
        return SumRound(state, ranks, quorum, found.channel, enough, largest, rule=found.rule, optimiser=found.server)

    def _evaluate(self, fleet: Fleet, state: ServerState, part: Part, what: str) -> Evaluation:
        """Every client on its own rows, and one node on the central test set, as far as the experiment asks."""
        parts: dict[int, list[Part]] = {c: [part] if self.found.evaluation.clients else [] for c in fleet.nodes}
        if self.found.evaluation.central and fleet.central is not None and not self._is_personal(state):
            parts[fleet.central].append("central")
        asked = {c: p for c, p in parts.items() if p}
        self.view.work(what, len(asked))
        deadline = self.found.selection.deadline
        return evaluate(
            fleet, state, dict.fromkeys(asked, WHOLE), asked, deadline, lambda client, problem: self.view.advance()
        )

    def _is_personal(self, state: ServerState) -> bool:
        """Whether the shared adapter is only a part of each client's, so that by itself it says nothing."""
        return bool(self.found.rule.personal(state.task.spec))

    def _end(self, fleet: Fleet, state: ServerState) -> None:
        scores = self._evaluate(fleet, state, "test", "test")
        for client, reason in scores.refused:
            self.view.note(f"client {client} could not be evaluated: {reason}")
        done = history(self.folder.path)
        self.folder.append(
            FinalRecord(
                rounds=state.task.round,
                central=_central(scores),
                test=_clients(scores, "test"),
                seconds=done.seconds,
                adapter_digest=state.adapter.digest,
                bytes_up=done.bytes_up,
                bytes_down=done.bytes_down,
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
