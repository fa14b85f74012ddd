"""A grid that brings a kit to the devices that lack it, beside whatever else it carries.

A device that is asked anything, and lacks the run's kit, answers which bytes it lacks. Such an answer is held back
here: the bytes go out, chunk by chunk, whenever somebody waits for answers, and when the kit is whole what was asked is
asked again. So whoever asks only sees an answer that takes longer, and its deadlines hold.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.flower.answers import Refusal, pack_refusal, unpack_refusal
from fedpeft.flower.errand import Errand
from fedpeft.flower.kits import KIT_QUERY, WHOLE, Lack, is_lack, manifest_of, unpack_lack
from fedpeft.flower.packing import glance, payload_bytes
from fedpeft.flower.post import Traffic

PATIENCE = 300.0
"""Seconds after which a chunk is sent again."""
TRIES = 5
"""Chunks in a row that may bring a device no further, and times that a file may come damaged."""
AT_ONCE = 8
"""Devices that are served at the same time: what is under way to each is in memory."""


class Shipping(Grid):
    """``grid``, with the kit in ``folder`` for whom it lacks.

    say: told of each device that is served, in a line; clock: seconds that only grow. A device that can't take the kit
    is refused from then on, with its reason, and nobody else is held up.
    """

    def __init__(
        self,
        grid: Grid,
        folder: Path,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        patience: float = PATIENCE,
    ) -> None:
        self.inner, self.folder = grid, folder
        self.digest, self._sizes = manifest_of(folder)
        self._say, self._clock, self._patience = say, clock, patience
        self._asked: dict[str, tuple[Message, float]] = {}
        self._again: dict[str, str] = {}
        self._waited: frozenset[str] = frozenset()
        self._errands: dict[int, Errand] = {}
        self._refused: dict[int, str] = {}
        self._ready: list[Message] = []
        self._down = self._up = 0

    @property
    def is_serving(self) -> bool:
        """Whether the kit is on its way to somebody, or somebody who has got it is about to answer."""
        now = self._clock()
        return bool(self._errands) or any(self._asked[name][1] > now for name in self._again if name in self._waited)

    @property
    def bytes(self) -> int:
        """Of the whole kit."""
        return sum(self._sizes.values())

    def take_traffic(self) -> Traffic:
        """What was sent and came beside what others asked, since this was last taken."""
        traffic, self._down, self._up = Traffic(self._down, self._up), 0, 0
        return traffic

    @override
    def set_run(self, run: Run) -> None:
        self.inner.set_run(run)

    @property
    @override
    def run(self) -> Run:
        return self.inner.run

    @override
    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    @override
    def get_node_ids(self) -> Iterable[int]:
        return self.inner.get_node_ids()

    @override
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        accepted = list(self.inner.push_messages(batch))
        taken, now = set(accepted), self._clock()
        held = self._held()
        self._asked = {name: x for name, x in self._asked.items() if x[1] > now or name in held}
        for message in batch:
            if (name := message.metadata.message_id) in taken:
                self._asked[name] = message, now + message.metadata.ttl
        return accepted

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = list(dict.fromkeys(message_ids))
        self._waited = frozenset(wanted)
        self._go_on()
        # A SuperLink has no second answer to what was answered: what is pulled again is an error.
        settled = self._held() | {x.metadata.reply_to_message_id for x in self._ready}
        first = {self._again.get(name, name): name for name in wanted if name not in settled}
        errands = {errand.message: errand for errand in self._errands.values() if errand.message}
        for message in self.inner.pull_messages([*first, *errands]):
            name = message.metadata.reply_to_message_id
            if name in errands:
                self._answered(errands[name], message)
            elif name in first and message.has_content() and is_lack(message.content):
                self._hold(first[name], message)
            else:
                self._asked.pop(first.get(name, name), None)
                self._again.pop(first.get(name, name), None)
                message.metadata.__dict__["_reply_to_message_id"] = first.get(name, name)  # Flower has no public way
                self._ready.append(message)
        if errands:
            self._go_on()
        mine = [x for x in self._ready if x.metadata.reply_to_message_id in self._waited]
        self._ready = []  # what nobody waits for any longer is nobody's
        return mine

    @override
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies that came in time."""
        until = None if timeout is None else self._clock() + timeout
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting and (until is None or self._clock() < until):
            found = self.pull_messages(waiting)
            replies += found
            waiting -= {x.metadata.reply_to_message_id for x in found}
            if not found:
                time.sleep(0.1)
        return replies

    def _held(self) -> set[str]:
        """The ids of what nodes are to be asked again once they have the kit."""
        return {name for errand in self._errands.values() for name in errand.held}

    def _hold(self, name: str, message: Message) -> None:
        """A node lacks the kit: its question waits until it has it."""
        asked = self._asked.get(name)
        if asked is None:
            return
        node = asked[0].metadata.dst_node_id
        self._up += payload_bytes(message.content)
        try:
            lack = self._read(message)
        except ProtocolError as error:
            self._refuse(node, str(error), [name])
            return
        if node in self._refused:
            self._refuse(node, self._refused[node], [name])
        elif lack.place == WHOLE:
            self._refuse(node, f"it has the run's kit, {self.digest[:16]}…, and still asks for it", [name])
        elif node in self._errands:
            self._errands[node].held.append(name)
        else:
            has = f"has {lack.has[:16]}…" if lack.has else "has none"
            told = f"; {lack.why}" if lack.why else ""
            self._say(f"node {node}: gets the kit {self.digest[:16]}…, {self.bytes / 1e6:.1f} MB ({has}{told})")
            self._errands[node] = Errand(node, lack.place, lack.rest, self._clock(), held=[name])

    def _go_on(self) -> None:
        """Begin what there is room for, and send again what was not answered."""
        now = self._clock()
        for errand in list(self._errands.values()):
            if errand.message and now - errand.sent > self._patience:
                self._failed(errand, f"no answer within {self._patience:g} seconds")
        for errand in list(self._errands.values())[:AT_ONCE]:  # in the order in which they came
            if not errand.message:
                self._send(errand)

    def _answered(self, errand: Errand, message: Message) -> None:
        """The node's answer to a chunk: which bytes it lacks now."""
        node, errand.message = errand.node, ""
        if not message.has_content():
            self._failed(errand, f"Flower's error {message.error.code}: {message.error.reason}")
            return
        self._up += payload_bytes(message.content)
        try:
            if glance(message.content)[0] == "error":
                raise ProtocolError(unpack_refusal(message.content).reason)
            lack = self._read(message)
        except ProtocolError as error:
            self._refuse(node, str(error), self._errands.pop(node).held)
            return
        if lack.place == WHOLE:
            self._done(errand)
        elif lack.why:
            errand.damaged += 1
            errand.place, errand.rest = lack.place, lack.rest
            if errand.damaged >= TRIES:
                self._refuse(node, f"{lack.why} ({TRIES} times)", self._errands.pop(node).held)
        elif lack.place == errand.place:
            self._failed(errand, "it asks for the same bytes again")
        else:
            errand.went_on(lack, self._clock() - errand.sent)

    def _send(self, errand: Errand) -> None:
        try:
            packed = errand.packed(self.folder, self.digest, self._sizes)
        except (ProtocolError, OSError) as error:
            self._refuse(errand.node, str(error), self._errands.pop(errand.node).held)
            return
        message = Message(packed, errand.node, KIT_QUERY, ttl=self._patience, group_id="kit")
        errand.sent = self._clock()
        if name := self._push(message):
            errand.message = name
            errand.messages += 1
            self._down += payload_bytes(packed)
        else:
            self._failed(errand, "the message could not be sent")

    def _failed(self, errand: Errand, why: str) -> None:
        """A chunk was lost. A node that has gone is forgotten, since it says what it lacks when it is back."""
        errand.was_lost()
        if errand.node not in set(self.inner.get_node_ids()):
            self._errands.pop(errand.node)
            self._say(f"node {errand.node}: went away with its kit at {errand.place[0]}, byte {errand.place[1]}")
            self._return(errand.held, "it went away before it had the run's kit")
        elif errand.failed >= TRIES:
            self._refuse(errand.node, f"{why}, {TRIES} times", self._errands.pop(errand.node).held)

    def _done(self, errand: Errand) -> None:
        """The node has the kit: it is asked once more what somebody still waits for."""
        self._errands.pop(errand.node)
        seconds, megabytes = self._clock() - errand.began, errand.bytes / 1e6
        self._say(
            f"node {errand.node}: has the kit after {seconds:.0f} s, {megabytes:.1f} MB in {errand.messages} messages"
        )
        for name in errand.held:
            old, until = self._asked[name]
            if name not in self._waited and until <= self._clock():
                continue
            told = old.metadata
            message = Message(old.content, told.dst_node_id, told.message_type, ttl=told.ttl, group_id=told.group_id)
            if new := self._push(message):
                self._again[name] = new
                self._asked[name] = old, self._clock() + told.ttl
                self._down += payload_bytes(old.content)
            else:
                self._return([name], "the message could not be sent")

    def _refuse(self, node: int, why: str, held: Iterable[str]) -> None:
        if node not in self._refused:
            self._refused[node] = why
            self._say(f"node {node}: can't have the run's kit: {why}")
        self._return(held, why)

    def _return(self, held: Iterable[str], why: str) -> None:
        """Answer in the place of a node."""
        for name in held:
            asked, _ = self._asked.pop(name)
            self._ready.append(Message(pack_refusal(Refusal("failed", f"kit: {why}")), reply_to=asked))

    def _push(self, message: Message) -> str:
        """The id of a message that is on its way; "" if its node would not take it."""
        accepted = set(self.inner.push_messages([message]))
        return message.metadata.message_id if message.metadata.message_id in accepted else ""

    def _read(self, message: Message) -> Lack:
        lack = unpack_lack(message.content)
        if lack.digest != self.digest:
            raise ProtocolError(f"it asks for the kit {lack.digest[:16]}…; the run's is {self.digest[:16]}…")
        return lack
