"""A client's half of a secure round: the protocol's messages answered, and trained on where they bring a model.

What is trained is kept in the client's own store until the round's vectors are asked for; the protocol's own state in
the vault. An answer holds nothing of the client but the protocol's bytes: where something goes wrong on its side, one
of a few fixed sentences says so, and the client's own log has the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger

import numpy as np
from flwr.app import Message, RecordDict

from fedpeft.adapters import Spec, Update
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.flower.agreement import Terms
from fedpeft.flower.answers import Refusal, pack_refusal
from fedpeft.flower.footprints import Footprints
from fedpeft.flower.jobs import Ready, ready, received, to_keep
from fedpeft.flower.member import Secure, is_last_word, step_of
from fedpeft.flower.participant import Participant, RefusedError, refusal_of
from fedpeft.flower.requests import Request
from fedpeft.flower.results import one_by_one
from fedpeft.flower.sealed import Sealed, pack_reply, unpack_sealed
from fedpeft.flower.vault import Vault
from fedpeft.flower.vectors import OwnVectors, UntrainedError, to_recall
from fedpeft.rounds import Done, Failed
from fedpeft.rules import Task
from fedpeft.secagg import Params
from fedpeft.secagg.encoding import lp, parts
from fedpeft.secagg.messages import session_of
from fedpeft.secagg.protocol import ClientSide, Step

_LOG = getLogger(__name__)
_UNABLE = "this client could not train"
_BROKEN = "this client could not answer"


def answer_secure(
    participant: Participant,
    client_of: Callable[[Message], int],
    messages: Sequence[Message],
    vault: Vault,
    notes: Footprints | None = None,
) -> Iterator[RecordDict]:
    """An answer to each message of a secure session, in order; clients that have to train are trained together.

    What needs no training is answered when its turn comes, so that no two clients' vectors are in memory. notes: where
    they write down the memory that their training has taken.
    """
    shared = _Shared(participant)
    plans = [_planned(participant, shared, client_of, message, vault) for message in messages]
    plans = [_begun(plan) if isinstance(plan, _Plan) and plan.is_to_train else plan for plan in plans]
    jobs = [plan.ready.job for plan in plans if isinstance(plan, _Plan) and plan.ready and plan.ready.job]
    results = one_by_one(participant.trainer.train_many, jobs)
    for plan in plans:
        now = _begun(plan) if isinstance(plan, _Plan) and not plan.is_to_train else plan
        if isinstance(now, Refusal):
            yield pack_refusal(now)
            continue
        result = next(results) if now.ready is not None else None
        if now.ready is not None and now.ready.job is not None and isinstance(result, Done):
            participant.note(notes, now.ready.job)
        try:
            yield pack_reply(now.finish(result))
        except Exception as error:
            now.wipe()
            yield pack_refusal(said_of(error, now.client))


def _begun(plan: "_Plan") -> "_Plan | Refusal":
    try:
        plan.begin()
    except Exception as error:
        plan.wipe()
        return said_of(error, plan.client)
    return plan


@dataclass(slots=True)
class _Shared:
    """Requests that messages have in common, each unpacked once."""

    participant: Participant
    _found: dict[tuple[int, ...], Request] = field(default_factory=dict)
    _spec: Spec | None = None

    @property
    def spec(self) -> Spec:
        """The server's adapter, as this client itself knows it."""
        if self._spec is None:
            self._spec = self.participant.trainer.start().spec
        return self._spec

    def request(self, content: RecordDict) -> Request:
        key = tuple(id(record) for record in content.values())
        if key not in self._found:
            self._found[key] = received(self.participant, content)
        return self._found[key]


def _planned(
    participant: Participant,
    shared: _Shared,
    client_of: Callable[[Message], int],
    message: Message,
    vault: Vault,
) -> "_Plan | Refusal":
    client = None
    try:
        secure = participant.secure
        if secure is None:
            raise ProtocolError("this client has no identity for secure aggregation: `fedpeft keys init` makes one")
        client = client_of(message)
        sealed = unpack_sealed(message.content)
        try:
            request = None if sealed.request is None else shared.request(sealed.request)
        except (ProtocolError, RefusedError) as error:  # about the coordinator's message, and not about the client
            return refusal_of(error)
        if request is not None and request.settings != sealed.settings:
            raise ProtocolError("the settings of what came to train on are not those of the message: want the same")
        return _Plan(participant, secure, vault, client, sealed, request, shared.spec)
    except Exception as error:
        return said_of(error, client)


def said_of(error: Exception, client: int | None = None) -> Refusal:
    """A refusal that tells nothing of the client's data."""
    if isinstance(error, RefusedError):
        return error.refusal
    if isinstance(error, ProtocolError | ConfigError):
        return refusal_of(error)
    who = "this node" if client is None else f"client {client}"
    _LOG.warning("%s can't answer a secure message: %s", who, type(error).__name__)
    return Refusal("failed", _BROKEN)


@dataclass(slots=True, eq=False)
class _Plan:
    """One message to one client, from what was kept to the answer. ready: what has to be trained for it, if anything;
    step: what the protocol has answered, None while it waits for the training."""

    participant: Participant
    secure: Secure
    vault: Vault
    client: int
    sealed: Sealed
    request: Request | None
    spec: Spec
    ready: Ready | None = None
    step: Step | None = None

    @property
    def thread(self) -> str:
        return self.sealed.thread

    @property
    def message(self) -> bytes:
        return self.sealed.message

    @property
    def is_to_train(self) -> bool:
        """Whether a model to train on came with the message."""
        return self.request is not None and not self.request.broadcast.task.pass_

    def begin(self) -> None:
        """Let the protocol check the message and answer it, and see whether there is something to train."""
        params, state = self._kept()
        with suppress(UntrainedError):
            self._answer(params, state)
        is_refused = self.step is not None and self.step.was_refused
        if self.request is None or not self.is_to_train or is_refused or self._vectors(params).has_update:
            return
        try:
            self.ready = ready(self.participant, self.client, self.request)
        except RefusedError as error:
            _LOG.warning("client %d takes no part: %s", self.client, error.refusal.reason)
            raise RefusedError(Refusal("failed", _UNABLE)) from None

    def finish(self, result: Done | Failed | None) -> bytes:
        """The answer, once everything is trained that had to be."""
        if self.ready is not None:
            self._keep(self.ready, result)
        if self.step is None:  # it had asked for the vector at once
            self._answer(*self._kept())
        assert self.step is not None
        answer, self.step = self.step.answer, None  # of which no copy stays here
        return answer

    def wipe(self) -> None:
        """Forget the session: the client is out of it."""
        self.vault.wipe(self.client, self.thread)

    def _answer(self, params: Params | None, state: bytes) -> None:
        """Let the protocol answer. UntrainedError where it asks for a vector of what has still to be trained."""
        vectors = self._vectors(params)
        self._settle(self._side(params).answer(state, self.message, vectors, self.secure.entropy), params)

    def _kept(self) -> tuple[Params | None, bytes]:
        """What the session is about, and the protocol's state.

        Of the session that the message names, and of no other: vectors are scaled by what was agreed to for it.
        """
        kept = self.vault.read(self.client, self.thread)
        said, state = parts(kept, 2) if kept else (b"", b"")
        held = Params.from_json(said) if said else None
        named = session_of(self.message)
        if held is not None and (named is None or held.session == named.hex()):
            return held, state
        try:
            return self.secure.params(self.message), state
        except ProtocolError:  # which the protocol finds for itself, and signs that it refuses it
            return None, state

    def _settle(self, step: Step, params: Params | None) -> None:
        """Write down what this answer commits the client to, before it leaves."""
        if params is not None:
            journal = self.secure.journal
            journal.begin(self.client, params.session)
            if not step.was_refused and not journal.answers(self.client, params.session, step_of(self.message)):
                raise ProtocolError("this was answered before: want each question once")
            if not step.was_refused and (step.is_over or is_last_word(self.message)):
                self._complete(params)
        if step.is_over:
            self.wipe()
        elif not step.was_refused:  # or else it was of another session, and leaves this one as it is
            self.vault.write(self.client, self.thread, lp(b"" if params is None else params.to_json(), step.state))
        self.step = step

    def _complete(self, params: Params) -> None:
        journal, run, round = self.secure.journal, self.secure.run, params.fl_round
        if not journal.complete(self.client, run, round, params.session):
            raise ProtocolError(f"round {round} was opened in another session: want no second sum of the same changes")

    def _keep(self, plan: Ready, result: Done | Failed | None) -> None:
        why = result.reason if isinstance(result, Failed) else "the trainer gave no result"
        if isinstance(result, Done) and not _is_finite(result):  # now, while it costs the others nothing
            why = "what it has trained is NaN or infinite"
        elif isinstance(result, Done) and plan.job is not None and self.request is not None:
            update = Update(plan.job.start, result.trained, result.travel, result.moves)
            state = to_keep(self.participant, plan, update, result) | to_recall(update, result.metrics, self.request)
            self.participant.store.save(self.client, plan.task.round, state)
            return
        _LOG.warning("client %d takes no part in round %d: %s", self.client, plan.task.round, why)
        raise RefusedError(Refusal("failed", _UNABLE))

    def _side(self, params: Params | None) -> ClientSide:
        secure, terms = self.secure, self._terms
        round, cohort = (0, 1) if params is None else (params.fl_round, params.n)
        if params is not None and params.run_id != terms.run_id:
            if (run := params.run_id.rpartition(" ")[0]) != secure.run:
                raise ProtocolError(f"the session is of run {run[:80]!r}; want {secure.run!r}")
            raise ProtocolError("the settings that came are not those of the session: want the same for all clients")
        rank = None if terms.rule.hides_ranks else secure.rank(self.client, round)
        expected = terms.expected(Task(self.spec, round), cohort, rank)
        history = secure.journal.history(self.client, secure.run, round)
        me = secure.identity(self.client)
        return secure.protocol.client(me, secure.roster(), secure.policy, history, expected)

    @property
    def _terms(self) -> Terms:
        here, secure = self.participant, self.secure
        return Terms(
            secure.run,
            secure.suite,
            here.rule,
            secure.channel,
            here.weighting.largest,
            here.trainer.base,
            here.exactness,
            self.sealed.settings,
        )

    def _vectors(self, params: Params | None) -> OwnVectors:
        return OwnVectors(self.participant, self.secure, self._terms, self.client, params, self.request, self.spec)


def _is_finite(result: Done) -> bool:
    return all(np.isfinite(x).all() for x in result.trained.tensors().values())
