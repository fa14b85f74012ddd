"""Messages under way to nodes: pushed, polled for, matched with their clients, counted.

Replies are matched by the message that they reply to and never by who sends them, because Flower's
own error replies for lost nodes come from node 1.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Refusal, unpack_refusal
from fedpeft.flower.packing import glance, payload_bytes

_FIRST_WAIT, _LONGEST_WAIT, _GROWTH = 0.02, 1.0, 1.5


@dataclass(frozen=True, slots=True)
class Leg:
    """What one phase of a secure session cost: its name, the pass it belongs to, seconds, bytes down and up, and how
    many clients were asked and answered."""

    name: str
    pass_: int
    seconds: float
    bytes_down: int
    bytes_up: int
    asked: int = 0
    answered: int = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a phase cost on the wire.

    bytes_down, bytes_up: packed records, to and from clients; timeline: (client, sent, answered) in
    seconds since the phase began; strays: replies to messages that this phase did not send; each: the bytes down
    and up of each client; legs: of a secure session, phase by phase.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    timeline: tuple[tuple[int, float, float], ...] = ()
    strays: int = 0
    each: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    legs: tuple[Leg, ...] = ()

    def then(self, later: "Traffic", seconds: float) -> "Traffic":
        """Both together, of which the second began so many seconds after the first."""
        each = {
            client: (self.each.get(client, (0, 0))[0] + x, self.each.get(client, (0, 0))[1] + y)
            for client, (x, y) in later.each.items()
        }
        return Traffic(
            self.bytes_down + later.bytes_down,
            self.bytes_up + later.bytes_up,
            self.timeline + tuple((client, x + seconds, y + seconds) for client, x, y in later.timeline),
            self.strays + later.strays,
            dict(sorted((dict(self.each) | each).items())),
            self.legs + later.legs,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Letter:
    """What goes to one client. client: its number, or its node's where that is not known yet.

    digest: of the constants that it refers to; in_full: writes the same letter with the constants in
    full, for a node that turns out not to hold them; None where they are in it; version: the rank and the digest of
    the version that it brings.
    """

    client: int
    node: int
    content: RecordDict
    digest: str = ""
    in_full: Callable[[], RecordDict] | None = None
    version: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What came back. is_current: it is the first answer to a letter of this pass."""

    letter: Letter
    content: RecordDict | Refusal
    is_current: bool


@dataclass(slots=True)
class Post:
    """Carries the letters of one phase: any number of passes, of one kind of message.

    clock: seconds that only grow; sleep: waits so many seconds.
    """

    grid: Grid
    kind: str
    group: str
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    _began: float = field(init=False)
    _waiting: dict[str, Letter] = field(default_factory=dict, init=False)
    _earlier: dict[str, Letter] = field(default_factory=dict, init=False)
    _sent: dict[str, float] = field(default_factory=dict, init=False)
    _timeline: list[tuple[int, float, float]] = field(default_factory=list, init=False)
    _down: Counter[int] = field(default_factory=Counter, init=False)
    _up: Counter[int] = field(default_factory=Counter, init=False)
    _strays: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def traffic(self) -> Traffic:
        """The cost so far; the timeline in ascending order of answers."""
        each = {client: (self._down[client], self._up[client]) for client in sorted(self._down.keys() | self._up)}
        return Traffic(self._down.total(), self._up.total(), tuple(self._timeline), self._strays, each)

    def push(self, letters: Iterable[Letter], seconds: float) -> tuple[int, ...]:
        """Send letters that are good for so many seconds; those whose node would not take them are given back."""
        batch = list(letters)
        messages = [Message(x.content, x.node, self.kind, ttl=max(seconds, 0.001), group_id=self.group) for x in batch]
        # A list: a generator pushes nothing through Flower's deployed grid.
        accepted = set(self.grid.push_messages(messages)) if messages else set()
        now = self.clock() - self._began
        unsent: list[int] = []
        for letter, message in zip(batch, messages, strict=True):
            name = message.metadata.message_id
            if name not in accepted:
                unsent.append(letter.client)
                continue
            self._down[letter.client] += payload_bytes(letter.content)
            self._waiting[name] = letter
            self._sent[name] = now
        return tuple(unsent)

    def replies(self, seconds: float, is_settled: Callable[[], bool]) -> Iterator[Reply]:
        """Replies as they come, until nothing is waited for, all is settled, or so many seconds have passed."""
        until = self.clock() + seconds
        wait = _FIRST_WAIT
        while self._waiting and not is_settled() and self.clock() < until:
            count = 0
            for message in self.grid.pull_messages(list(self._waiting)):
                count += 1
                reply = self._match(message)
                if reply is not None and not self._sent_again(reply, until - self.clock()):
                    yield reply
                if is_settled():
                    break
            wait = _FIRST_WAIT if count else min(wait * _GROWTH, _LONGEST_WAIT)
            if not count:
                self.sleep(max(0.0, min(wait, until - self.clock())))
        self._earlier |= self._waiting
        self._waiting.clear()

    def some(self, seconds: float) -> list[Reply]:
        """The replies that come together, as soon as there are any; none after so many seconds.

        What is not answered by then is still waited for.
        """
        until = self.clock() + seconds
        wait = _FIRST_WAIT
        while self._waiting:
            found = [self._match(message) for message in self.grid.pull_messages(list(self._waiting))]
            current = [x for x in found if x is not None and x.is_current]
            replies = [x for x in current if not self._sent_again(x, until - self.clock())]
            if replies or self.clock() >= until:
                return replies
            self.sleep(max(0.0, min(wait, until - self.clock())))
            wait = min(wait * _GROWTH, _LONGEST_WAIT)
        return []

    def abandon(self, client: int) -> None:
        """Wait no more for this client."""
        for name in [name for name, letter in self._waiting.items() if letter.client == client]:
            self._earlier[name] = self._waiting.pop(name)

    def later(self) -> "Post":
        """The post of the next phase, which goes on waiting for what this one waits for; its counts begin at zero."""
        post = Post(self.grid, self.kind, self.group, self.clock, self.sleep)
        post._waiting = dict(self._waiting)
        post._sent = {name: self._sent[name] + self._began - post._began for name in self._waiting}
        return post

    def _match(self, message: Message) -> Reply | None:
        name = message.metadata.reply_to_message_id
        if name in self._waiting:
            letter = self._earlier[name] = self._waiting.pop(name)
            self._timeline.append((letter.client, self._sent[name], self.clock() - self._began))
            return Reply(letter, self._open(message, letter.client), True)
        if name in self._earlier:
            return Reply(self._earlier[name], self._open(message, self._earlier[name].client), False)
        self._strays += 1
        return None

    def _sent_again(self, reply: Reply, seconds: float) -> bool:
        """Whether the node asked for constants that it was thought to hold, and gets them now."""
        letter, content = reply.letter, reply.content
        if letter.in_full is None or not isinstance(content, Refusal) or content.cause != "constants":
            return False
        return not self.push([replace(letter, content=letter.in_full(), in_full=None)], seconds)

    def _open(self, message: Message, client: int) -> RecordDict | Refusal:
        if not message.has_content():
            error = message.error
            return Refusal("failed", f"Flower's error {error.code}: {error.reason or 'no reason given'}"[:500])
        try:
            self._up[client] += payload_bytes(message.content)
            return unpack_refusal(message.content) if glance(message.content)[0] == "error" else message.content
        except ProtocolError as error:
            return Refusal("refused", str(error))
