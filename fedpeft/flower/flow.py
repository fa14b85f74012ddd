"""The coordinator's side of buffered rounds: keeps so many clients at work, over any grid and any clock."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedpeft.errors import ProtocolError
from fedpeft.flower.drive import OnReply, Writer, term_of
from fedpeft.flower.fleet import Fleet
from fedpeft.flower.post import Post, Reply, Traffic
from fedpeft.rounds import Buffer
from fedpeft.rules import Broadcast, ServerState


def _ignore(client: int, problem: str | None) -> None:
    pass


@dataclass(slots=True)
class Flow:
    """Letters under way from step to step, to clients of the fleet.

    seed: of who is asked; deadline: seconds after which a client's answer is no longer waited
    for, and another is asked in its place.
    """

    fleet: Fleet
    buffer: Buffer
    seed: int
    deadline: float
    on_reply: OnReply = _ignore
    _post: Post = field(init=False)
    _expires: dict[int, float] = field(default_factory=dict, init=False)
    _asked: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._post = Post(self.fleet.grid, "train", "buffered", self.fleet.clock, self.fleet.sleep)

    def fill(self) -> tuple[tuple[int, ...], Traffic]:
        """Bring in answers until the buffer is full, or nobody is left to ask: who was asked, and what that cost.

        What is wrong with an answer is counted in the buffer and never raised; too few show in ``buffer.step``.
        """
        for client in set(self._expires) - set(self.buffer.at_work):  # too old since the last step
            self._drop(client)
        self._post, self._asked = self._post.later(), []
        while not self.buffer.is_full:
            self._ask_more()
            if not self.buffer.at_work:
                break
            for reply in self._post.some(max(0.0, min(self._expires.values()) - self.fleet.clock())):
                self._take(reply)
            for client in [c for c, until in self._expires.items() if until <= self.fleet.clock()]:
                self._drop(client)
                self.buffer.refuse(client, "no answer before the deadline")
        return tuple(self._asked), self._post.traffic

    def again(self, client: int, state: ServerState) -> None:
        """Ask this client, who was at work when a run was cut off, once more, with the adapter of this state."""
        rank = self.buffer.rank(client, state.task.round)
        self._send([client], lambda _: self.buffer.rule.send(state, rank))

    def _ask_more(self) -> None:
        while self.buffer.has_room:
            chosen = self.buffer.choose(self.fleet.clients(), self.seed)
            if not chosen:
                return
            self._asked += chosen
            self._send(chosen, self.buffer.ask)

    def _send(self, clients: Sequence[int], broadcast: Callable[[int], Broadcast]) -> None:
        writer = Writer(self.fleet, "train")
        letters, now = [], self.fleet.clock()
        for client in clients:
            said = broadcast(client)
            self._expires[client] = now + self.deadline
            if client in self.fleet.nodes:
                letters.append(writer.letter(client, self.buffer.rank(client, said.task.round), said))
            else:
                self._refuse(client, "has no node")
        for client in self._post.push(letters, self.deadline):
            self._refuse(client, "the message could not be sent")

    def _take(self, reply: Reply) -> None:
        client = reply.letter.client
        del self._expires[client]
        try:
            term = term_of(reply, self.buffer.size, self.fleet.coding(self.buffer.layout))
        except ProtocolError as error:
            self.buffer.refuse(client, str(error))
            self.on_reply(client, str(error))
            return
        try:
            self.buffer.receive(client, term.vector, term.round, term.pass_)
        except ProtocolError as error:
            self.on_reply(client, str(error))
        else:
            self.fleet.found(reply.letter)
            self.on_reply(client, None)

    def _drop(self, client: int) -> None:
        self._expires.pop(client, None)
        self._post.abandon(client)

    def _refuse(self, client: int, reason: str) -> None:
        self._expires.pop(client, None)
        self.buffer.refuse(client, reason)
