"""The client's side: requests in, answers out, for one client or for all that share a process.

A deployed client calls ``serve`` with a list of one, an in-process grid with all that a round has
for this process, so that one trainer can train many clients in one step. There is no other way in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from flwr.app import Message, RecordDict

from fedpeft.adapters import Adapter, Update
from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import (
    Capabilities,
    Counts,
    Refusal,
    Term,
    pack_capabilities,
    pack_metrics,
    pack_refusal,
    pack_term,
)
from fedpeft.flower.footprints import Footprints
from fedpeft.flower.jobs import Ready, personal, ready, received, to_keep
from fedpeft.flower.kept import recall, remember
from fedpeft.flower.leftover import coded
from fedpeft.flower.participant import Participant, RefusedError, refusal_of
from fedpeft.flower.requests import Part, Request, unpack_query
from fedpeft.flower.results import of_tuned, one_by_one
from fedpeft.flower.secret import answer_secure
from fedpeft.flower.vault import Vault
from fedpeft.rounds import Done, Failed, Metrics, Trial, Tuned, contribute, derive
from fedpeft.rules import Broadcast

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, eq=False)
class _Evaluation:
    """A request to evaluate that can go ahead: a trial, or what to train first, for each part that has examples."""

    trials: Mapping[Part, Trial | Tuned | None]


def serve(
    participant: Participant,
    client_of: Callable[[Message], int],
    messages: Sequence[Message],
    vault: Vault | None = None,
    notes: Footprints | None = None,
) -> Iterator[Message]:
    """One reply a message, in order, each as soon as it is there.

    What goes wrong for one client becomes a refusal with its reason, and the others go on. vault: what clients keep of
    secure sessions between their messages; none lasts longer than this call; notes: where they write down the memory
    that their training has taken, None where nobody will ask.
    """
    vault = Vault() if vault is None else vault
    for kind, group in groupby(messages, key=_kind):
        batch = list(group)
        if kind == "secure":
            answers = answer_secure(participant, client_of, batch, vault, notes)
        elif kind == "train":
            answers = _train(participant, client_of, batch, notes)
        else:
            answers = {"query": _query, "evaluate": _evaluate}[kind](participant, client_of, batch)
        for message, content in zip(batch, answers, strict=True):
            yield Message(content, reply_to=message)


def _kind(message: Message) -> str:
    category, _, action = message.metadata.message_type.partition(".")
    return "secure" if action == "secure" else category


def _query(
    participant: Participant, client_of: Callable[[Message], int], messages: Sequence[Message]
) -> Iterator[RecordDict]:
    for message in messages:
        try:
            yield _capabilities(participant, client_of(message), message.content)
        except Exception as error:
            yield pack_refusal(refusal_of(error))


def _capabilities(participant: Participant, client: int, content: RecordDict) -> RecordDict:
    query, secure = unpack_query(content), participant.secure
    return pack_capabilities(
        Capabilities(
            client,
            participant.trainer.base,
            participant.examples(client) if secure is None else None,
            participant.holds_central,
            participant.store.digests(),
            participant.trainer.start() if query.start == client else None,
            participant.rank(client),
            "" if secure is None else secure.identity(client).id.hex(),
        )
    )


def _train(
    participant: Participant,
    client_of: Callable[[Message], int],
    messages: Sequence[Message],
    notes: Footprints | None,
) -> Iterator[RecordDict]:
    plans = _plans(participant, client_of, messages, _ready)
    jobs = [plan.job for plan in plans if isinstance(plan, Ready) and plan.job is not None]
    results = one_by_one(participant.trainer.train_many, jobs)
    for plan in plans:
        if isinstance(plan, Refusal):
            yield pack_refusal(plan)
            continue
        result = None if plan.job is None else next(results)
        if plan.job is not None and isinstance(result, Done):
            participant.note(notes, plan.job)
        try:
            yield pack_term(_term(participant, plan, result))
        except Exception as error:
            yield pack_refusal(refusal_of(error))


def _ready(participant: Participant, client: int, request: Request) -> Ready:
    if participant.secure is not None:
        raise ProtocolError("this client's run is secure: it sends nothing in the clear that it has trained")
    return (
        Ready(client, request.broadcast.task) if request.broadcast.task.pass_ else ready(participant, client, request)
    )


def _term(participant: Participant, plan: Ready, result: Done | Failed | None) -> Term:
    rule, task = participant.rule, plan.task
    if isinstance(result, Failed):
        raise RefusedError(Refusal("failed", result.reason))
    if result is None or plan.job is None:
        past = recall(participant.store.at(plan.client, task.round))
        if past is None:
            raise RefusedError(
                Refusal("failed", f"round {task.round}'s update is gone: can't answer pass {task.pass_}")
            )
        update, metrics = past
    else:
        update, metrics = Update(plan.job.start, result.trained, result.travel, result.moves), result.metrics
    weight = participant.weighting.weight(participant.examples(plan.client).train)
    vector = contribute(rule, participant.channel, update, weight, metrics, task, participant.exactness)
    small, left = coded(participant, plan.client, task, update.received, vector, plan.state or {})
    if result is not None:
        state = to_keep(participant, plan, update, result) | left
        state |= remember(update, metrics) if rule.passes > 1 else {}
        if state or plan.state is not None:
            participant.store.save(plan.client, task.round, state)
    return Term(task.round, task.pass_, vector, small)


def _evaluate(
    participant: Participant, client_of: Callable[[Message], int], messages: Sequence[Message]
) -> Iterator[RecordDict]:
    plans = _plans(participant, client_of, messages, _evaluation)
    asked = [x for plan in plans if isinstance(plan, _Evaluation) for x in plan.trials.values()]
    results = one_by_one(participant.trainer.evaluate_many, [x for x in asked if isinstance(x, Trial)])
    tuned: Iterator[Metrics | Failed] = iter(())
    if participant.tuner is not None and (training := [x for x in asked if isinstance(x, Tuned)]):
        results = iter(list(results))  # before the model in memory, which both may share, is trained
        tuned = of_tuned(participant.tuner(), training)
    for plan in plans:
        if isinstance(plan, Refusal):
            yield pack_refusal(plan)
            continue
        answers: dict[Part, Metrics] = {}
        failure = ""
        for part, trial in plan.trials.items():
            result = Metrics() if trial is None else next(tuned if isinstance(trial, Tuned) else results)
            if isinstance(result, Failed):
                failure = failure or result.reason
            else:
                answers[part] = result
        yield pack_refusal(Refusal("failed", failure)) if failure else pack_metrics(answers)


def _evaluation(participant: Participant, client: int, request: Request) -> _Evaluation:
    broadcast, counts = request.broadcast, participant.examples(client)
    if participant.secure is not None and set(request.parts) != {"central"}:
        raise ProtocolError("this client's run is secure: it evaluates on no rows of its own for others")
    state = participant.store.load(client, broadcast.task.round)
    mine = personal(participant, broadcast.adapter, broadcast.task, state or {})
    sizes = {"train": counts.train, "validation": counts.validation, "test": counts.test}
    trials: dict[Part, Trial | Tuned | None] = {}
    for part in request.parts:
        if part == "tuned":
            trials[part] = _tuned(participant, client, counts, mine, broadcast)
        elif part != "central":
            trials[part] = Trial(client, part, mine, broadcast.tail) if sizes[part] else None
        elif participant.holds_central:
            trials[part] = Trial(None, "test", broadcast.adapter, broadcast.tail)
        else:
            raise ProtocolError("this node does not hold the central test set")
    return _Evaluation(trials)


def _tuned(
    participant: Participant, client: int, counts: Counts, mine: Adapter, broadcast: Broadcast
) -> Trial | Tuned | None:
    """A client without rows to train on is evaluated as it is."""
    if participant.tuning is None or participant.tuner is None:
        raise ProtocolError("the settings let no client train for itself (personal.finetune)")
    if not counts.test or not counts.train:
        return Trial(client, "test", mine, broadcast.tail) if counts.test else None
    seed = derive(participant.seed, "personal", client)
    round, start = broadcast.task.round, participant.trainer.start()
    return participant.tuning.of(client, round, seed, mine, broadcast.tail, start)


def _plans(
    participant: Participant,
    client_of: Callable[[Message], int],
    messages: Sequence[Message],
    plan: Callable[[Participant, int, Request], Item],
) -> list[Item | Refusal]:
    """What to do for each message. Messages that share their content are unpacked once, and share its tensors."""
    requests: dict[int, Request] = {}
    plans: list[Item | Refusal] = []
    for message in messages:
        try:
            key = id(message.content)
            if key not in requests:
                requests[key] = received(participant, message.content)
            plans.append(plan(participant, client_of(message), requests[key]))
        except Exception as error:
            plans.append(refusal_of(error))
    return plans
