"""What a protocol may ask of a client: the digest of what came to train on, and its vectors.

What a vector is made of is kept in the client's own store, as tensors, from the training on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from typing_extensions import override

from fedpeft.adapters import Spec, Update
from fedpeft.errors import ProtocolError
from fedpeft.flower import facts as read
from fedpeft.flower.agreement import Terms, settings_digest
from fedpeft.flower.kept import recall, remember, under
from fedpeft.flower.member import Secure
from fedpeft.flower.packing import Tensor
from fedpeft.flower.participant import Participant
from fedpeft.flower.requests import Request
from fedpeft.rounds import Metrics, contribute_ring, shared_digest
from fedpeft.rules import Broadcast, Task
from fedpeft.secagg import Params
from fedpeft.secagg.protocol import Ring, Vectors


class UntrainedError(Exception):
    """A vector was asked for, and what it is made of has still to be trained."""


@dataclass(slots=True, eq=False)
class OwnVectors(Vectors):
    """What the protocol may ask of this client.

    params: what it has agreed to, by which its vectors are scaled; spec: of the server's adapter, as it knows it.
    """

    participant: Participant
    secure: Secure
    terms: Terms
    client: int
    params: Params | None
    request: Request | None
    spec: Spec

    @override
    def model_hash(self) -> bytes:
        if self.request is None:
            raise RuntimeError("no model came with this message, and nothing of a pass")
        sent = self.request.broadcast
        if sent.task.pass_:
            return shared_digest(sent.task)
        if self.params is not None:
            self._check_shape(sent, self.params)
        return self.request.model

    @property
    def has_update(self) -> bool:
        """Whether what came to train on has been trained on, and what came of it is kept."""
        if self.request is None or self.params is None:
            return False
        state = self.participant.store.at(self.client, self.request.broadcast.task.round)
        return state is not None and _what(state) == (self.request.model.hex(), settings_digest(self.request.settings))

    @override
    def vector(self, pass_: int) -> Ring:
        if self.params is None:
            raise RuntimeError("the session has no parameters that this client agreed to")
        update, metrics, task = self._update(self.params.fl_round)
        if pass_:
            if self.request is None:
                raise RuntimeError("nothing of this pass came with the message")
            task = self._of_pass(task, self.request.broadcast.task)
        if (task.round, task.pass_) != (self.params.fl_round, pass_):
            raise ProtocolError(f"round {task.round}, pass {task.pass_} came; want {self.params.fl_round}, {pass_}")
        # By the agreed parameters and nothing else: a client on a finer grid than the others stands out in the sum.
        grid = self.terms.grids(task, self.params.n, self.params.halvings)[pass_]
        here = self.participant
        weight = here.weighting.weight(here.examples(self.client).train)
        rng = np.random.default_rng(int.from_bytes(self.secure.entropy(32)))
        vector = contribute_ring(here.rule, grid, update, weight, metrics, task, here.exactness, rng)
        self._give(task.round)
        return vector

    def _give(self, round: int) -> None:
        """Write down that a vector leaves. ProtocolError for one too many: rounds may go on beside each other."""
        secure, most = self.secure, self.secure.policy.max_rounds
        if most is not None and secure.journal.history(self.client, secure.run, round).rounds >= most:
            raise ProtocolError(f"this client has taken part in {most} rounds of this run, its policy's max_rounds")
        secure.journal.gave(self.client, secure.run, round)

    def _of_pass(self, kept: Task, sent: Task) -> Task:
        """A later pass's task, where it is of the shape that the session began with: nothing that is signed has it."""
        if sent.spec != kept.spec:
            raise ProtocolError("the adapter's shape in this pass is not that of the model that was trained on")
        return sent

    def _rank(self, params: Params) -> int:
        """Of which rank this client is in the session: as all were told, or its own where the rule hides that."""
        said = params.rank_by_id.get(self.secure.identity(self.client).id)
        return self.secure.rank(self.client, params.fl_round) if said is None else said

    def _check_shape(self, sent: Broadcast, params: Params) -> None:
        """ProtocolError for more directions than all were told, which it could be alone in, or fewer."""
        if sent.task.spec != self.spec or not self.participant.rule.is_for(sent, self._rank(params)):
            raise ProtocolError(f"the model that came is not one for rank {self._rank(params)} of this adapter")
        counts = params.ranks and self.secure.policy.min_slice > 1
        if counts and not self.participant.rule.is_nested(params.ranks, self.spec):
            raise ProtocolError("by this rule clients of these ranks may each be alone in what they add to")

    def _check_agreed(self, model: str, settings: str) -> None:
        """ProtocolError unless this model, by these settings, is what the session is about."""
        assert self.params is not None
        wanted = self.params.models.get(str(self._rank(self.params)))
        if model != wanted or self.params.run_id != f"{self.secure.run} {settings}":
            raise ProtocolError("what this client would add is not trained on the model that all were told of")

    def _update(self, round: int) -> tuple[Update, Metrics, Task]:
        if self.request is not None and not self.request.broadcast.task.pass_ and not self.has_update:
            self._check_agreed(self.request.model.hex(), settings_digest(self.request.settings))
            raise UntrainedError
        state = self.participant.store.at(self.client, round)
        past = recall(state)
        if state is None or past is None:
            raise RuntimeError(f"round {round}'s update is gone")
        self._check_agreed(*_what(state))
        update, metrics = past
        constants = self.participant.store.constants(_text(state, "constants")) or {}
        fixed = under(constants, "fixed/") | under(state, "update/fixed/")
        spec = read.spec_of(json.loads(_text(state, "spec")), "spec")
        task = Task(spec, round, 0, under(state, "update/shared/"))
        before, after = (replace(x, fixed=fixed) for x in (update.received, update.trained))
        return Update(before, after, update.travel, update.moves), metrics, task


def to_recall(update: Update, metrics: Metrics, request: Request) -> dict[str, Tensor]:
    """An update, and what it takes to encode it later on: of what is fixed, the digest where the store has it."""
    task = request.broadcast.task
    tensors = remember(update, metrics)
    tensors |= {f"update/shared/{n}": x for n, x in task.shared.items()}
    fixed = update.received.fixed.items()
    tensors |= {f"update/fixed/{n}": x for n, x in fixed if request.constants.get(f"fixed/{n}") is not x}
    spec = json.dumps({"spec": read.describe(task.spec)})
    said = {"model": request.model.hex(), "constants": request.digest, "spec": spec}
    said["settings"] = settings_digest(request.settings)
    return tensors | {f"update/said/{n}": np.frombuffer(x.encode(), np.uint8) for n, x in said.items()}


def _text(state: Mapping[str, Tensor], name: str) -> str:
    found = state.get(f"update/said/{name}")
    return "" if found is None else found.tobytes().decode()


def _what(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """The digests of the model that was trained on, and of the settings by which."""
    return _text(state, "model"), _text(state, "settings")
