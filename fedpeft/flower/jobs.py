"""A request to train, as a job of a client, and what the client keeps of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import RecordDict

from fedpeft.adapters import Adapter, Update
from fedpeft.flower.answers import Refusal
from fedpeft.flower.kept import its_own, under, with_own
from fedpeft.flower.packing import Tensor
from fedpeft.flower.participant import Participant, RefusedError
from fedpeft.flower.requests import Request, unpack_request
from fedpeft.flower.versions import Held
from fedpeft.rounds import Done, Job, derive
from fedpeft.rules import Task


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """A request to train that can go ahead. job: None where this round's training is done and kept; state: what the
    client had kept until then, None where that is nothing."""

    client: int
    task: Task
    job: Job | None = None
    state: Mapping[str, Tensor] | None = None


def received(participant: Participant, content: RecordDict) -> Request:
    """The request in a record. Raises RefusedError for one that is for another base; keeps constants that it brings."""
    restore = None if participant.down is None else Held(participant.down, participant.store).restore
    request = unpack_request(content, participant.store.constants, restore)
    mine = participant.trainer.base
    if request.base != mine:
        reason = (
            f"this node's base model and adapter shape are {mine}; the run's are {request.base[:80]}: "
            f"use the same model files and the same adapter settings on both"
        )
        raise RefusedError(Refusal("base", reason))
    if request.brought:
        participant.store.save_constants(request.digest, request.constants)
    return request


def ready(participant: Participant, client: int, request: Request) -> Ready:
    """What a client has to train. Raises RefusedError where it has nothing to train on."""
    task = request.broadcast.task
    if participant.examples(client).train == 0:
        raise RefusedError(Refusal("failed", "this client has no training examples"))
    state = participant.store.load(client, task.round)
    start, own = personal(participant, request.broadcast.adapter, task, state or {}), under(state or {}, "rule/")
    job = Job(
        client,
        task.round,
        derive(participant.seed, "train", task.round, client),
        start,
        participant.rule.trains(task),
        request.broadcast.tail,
        under(state or {}, "kept/"),
        participant.rule.objective(task, start, own),
        participant.rule.pool,
    )
    return Ready(client, task, job, state)


def to_keep(participant: Participant, plan: Ready, update: Update, result: Done) -> dict[str, Tensor]:
    """What the client keeps for later rounds."""
    rule, task, had = participant.rule, plan.task, plan.state or {}
    mine = its_own(result.trained, under(had, "personal/"), rule.personal(task.spec))
    state: dict[str, Tensor] = {f"personal/{n}": x for n, x in mine.items()}
    state |= {f"kept/{n}": x for n, x in result.kept.items()}
    state |= {f"rule/{n}": x for n, x in rule.keep(update, task, under(had, "rule/")).items()}
    return state


def personal(participant: Participant, adapter: Adapter, task: Task, state: Mapping[str, Tensor]) -> Adapter:
    """The adapter that a client begins with: the one that was sent, with what is its own in place."""
    mine = with_own(adapter, under(state, "personal/"), participant.rule.personal(task.spec))
    return participant.rule.begin(mine, under(state, "rule/"))
