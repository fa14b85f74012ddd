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
from fedpeft.channel import PlainChannel
from fedpeft.errors import ConfigError, ProtocolError
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
from fedpeft.flower.kept import its_own, recall, remember, under, with_own
from fedpeft.flower.packing import Tensor
from fedpeft.flower.requests import ConstantsMissing, Part, Request, unpack_query, unpack_request
from fedpeft.flower.results import of_tuned, one_by_one
from fedpeft.flower.store import ClientStore
from fedpeft.rounds import Done, Failed, Job, Metrics, Trainer, Trial, Tuned, Tuning, contribute, derive
from fedpeft.rules import Broadcast, Rule, Task, Weighting

Item = TypeVar("Item")


def _unsaid(client: int) -> None:
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Participant:
    """All that a process needs to take part: one for all the clients that it serves.

    store: in memory only for clients whose every message this very process gets; examples: how many
    a client has; rank: that it can train, where it is for it to say; holds_central: whether ``trainer`` can
    evaluate on the central test set; exactness: whether answers hold sketches of what was trained;
    tuning: what clients train for themselves when the run is over, and tuner: with what; None for nothing.
    """

    trainer: Trainer
    rule: Rule
    channel: PlainChannel
    weighting: Weighting
    seed: int
    store: ClientStore
    examples: Callable[[int], Counts]
    holds_central: bool = False
    rank: Callable[[int], int | None] = _unsaid
    exactness: bool = False
    tuning: Tuning | None = None
    tuner: Callable[[], Trainer] | None = None


class _RefusedError(Exception):
    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A request to train that can go ahead. job: None where this round's training is done and kept; state: what the
    client had kept until then, None where that is nothing."""

    client: int
    task: Task
    job: Job | None = None
    state: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Evaluation:
    """A request to evaluate that can go ahead: a trial, or what to train first, for each part that has examples."""

    trials: Mapping[Part, Trial | Tuned | None]


def serve(
    participant: Participant, client_of: Callable[[Message], int], messages: Sequence[Message]
) -> Iterator[Message]:
    """One reply a message, in order, each as soon as it is there.

    What goes wrong for one client becomes a refusal with its reason, and the others go on.
    """
    for kind, group in groupby(messages, key=lambda m: m.metadata.message_type.partition(".")[0]):
        run = {"query": _query, "train": _train, "evaluate": _evaluate}[kind]
        batch = list(group)
        for message, content in zip(batch, run(participant, client_of, batch), strict=True):
            yield Message(content, reply_to=message)


def refusal_of(error: Exception) -> Refusal:
    """What a client says of its own failure."""
    match error:
        case _RefusedError():
            return error.refusal
        case ConstantsMissing():
            return Refusal("constants", str(error))
        case ProtocolError():
            return Refusal("refused", str(error))
        case ConfigError():
            return Refusal("failed", str(error))
    return Refusal("failed", f"{type(error).__name__}: {error}")


def _query(
    participant: Participant, client_of: Callable[[Message], int], messages: Sequence[Message]
) -> Iterator[RecordDict]:
    for message in messages:
        try:
            yield _capabilities(participant, client_of(message), message.content)
        except Exception as error:
            yield pack_refusal(refusal_of(error))


def _capabilities(participant: Participant, client: int, content: RecordDict) -> RecordDict:
    query = unpack_query(content)
    return pack_capabilities(
        Capabilities(
            client,
            participant.trainer.base,
            participant.examples(client),
            participant.holds_central,
            participant.store.digests(),
            participant.trainer.start() if query.start == client else None,
            participant.rank(client),
        )
    )


def _train(
    participant: Participant, client_of: Callable[[Message], int], messages: Sequence[Message]
) -> Iterator[RecordDict]:
    plans = _plans(participant, client_of, messages, _ready)
    jobs = [plan.job for plan in plans if isinstance(plan, _Ready) and plan.job is not None]
    results = one_by_one(participant.trainer.train_many, jobs)
    for plan in plans:
        if isinstance(plan, Refusal):
            yield pack_refusal(plan)
            continue
        result = None if plan.job is None else next(results)
        try:
            yield pack_term(_term(participant, plan, result))
        except Exception as error:
            yield pack_refusal(refusal_of(error))


def _ready(participant: Participant, client: int, request: Request) -> _Ready:
    task = request.broadcast.task
    if task.pass_ > 0:
        return _Ready(client, task)
    if participant.examples(client).train == 0:
        raise _RefusedError(Refusal("failed", "this client has no training examples"))
    state = participant.store.load(client, task.round)
    start, own = _personal(participant, request.broadcast.adapter, task, state or {}), under(state or {}, "rule/")
    job = Job(
        client,
        task.round,
        derive(participant.seed, "train", task.round, client),
        start,
        participant.rule.trains(task),
        request.broadcast.tail,
        under(state or {}, "kept/"),
        participant.rule.objective(task, start, own),
    )
    return _Ready(client, task, job, state)


def _term(participant: Participant, plan: _Ready, result: Done | Failed | None) -> Term:
    rule, task = participant.rule, plan.task
    if isinstance(result, Failed):
        raise _RefusedError(Refusal("failed", result.reason))
    if result is None or plan.job is None:
        past = recall(participant.store.at(plan.client, task.round))
        if past is None:
            raise _RefusedError(
                Refusal("failed", f"round {task.round}'s update is gone: can't answer pass {task.pass_}")
            )
        update, metrics = past
    else:
        update, metrics = Update(plan.job.start, result.trained, result.travel), result.metrics
    weight = participant.weighting.weight(participant.examples(plan.client).train)
    vector = contribute(rule, participant.channel, update, weight, metrics, task, participant.exactness)
    if result is not None:
        had = plan.state or {}
        mine = its_own(result.trained, under(had, "personal/"), rule.personal(task.spec))
        state: dict[str, Tensor] = {f"personal/{n}": x for n, x in mine.items()}
        state |= {f"kept/{n}": x for n, x in result.kept.items()}
        state |= {f"rule/{n}": x for n, x in rule.keep(update, task, under(had, "rule/")).items()}
        state |= remember(update, metrics) if rule.passes > 1 else {}
        if state or plan.state is not None:
            participant.store.save(plan.client, task.round, state)
    return Term(task.round, task.pass_, vector)


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
    state = participant.store.load(client, broadcast.task.round)
    mine = _personal(participant, broadcast.adapter, broadcast.task, state or {})
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
                requests[key] = _request(participant, message.content)
            plans.append(plan(participant, client_of(message), requests[key]))
        except Exception as error:
            plans.append(refusal_of(error))
    return plans


def _request(participant: Participant, content: RecordDict) -> Request:
    request = unpack_request(content, participant.store.constants)
    mine = participant.trainer.base
    if request.base != mine:
        reason = (
            f"this node's base model and adapter shape are {mine}; the run's are {request.base[:80]}: "
            f"use the same model files and the same adapter settings on both"
        )
        raise _RefusedError(Refusal("base", reason))
    if request.brought:
        participant.store.save_constants(request.digest, request.constants)
    return request


def _personal(participant: Participant, adapter: Adapter, task: Task, state: Mapping[str, Tensor]) -> Adapter:
    mine = with_own(adapter, under(state, "personal/"), participant.rule.personal(task.spec))
    return participant.rule.begin(mine, under(state, "rule/"))
