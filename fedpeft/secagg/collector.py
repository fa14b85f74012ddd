"""The coordinator's half of ``twoserver``: one sum of masked vectors, and a sealed seed of each client in it."""

from typing import Final, NoReturn

import numpy as np
from typing_extensions import override

from fedpeft.errors import ProtocolError
from fedpeft.secagg.identity import SIGNATURE_SIZE
from fedpeft.secagg.messages import Abort
from fedpeft.secagg.one_phase import OnePhase
from fedpeft.secagg.params import Params
from fedpeft.secagg.protocol import Refused, Ring
from fedpeft.secagg.ring import add_packed, reduce, unpack
from fedpeft.secagg.sealing import SEALED, Channel, Entry, Request, read_answer
from fedpeft.secagg.transcript import KEY, agree, vector_text

_HEAD: Final = SEALED + SIGNATURE_SIZE
_PROBE: Final = bytes(range(1, 33))  # a private key that everybody knows: it shows whether a public key gives a secret


class Collector(OnePhase):
    """The server: one sum, and of each client in it a sealed seed. pinned: the helper's id, or none.

    A pass is summed once the helper has answered; until then its phase goes on, with nobody waited for.
    """

    def __init__(self, params: Params, pinned: bytes) -> None:
        super().__init__(bytes.fromhex(params.session), params.ids, params.dims)
        self.params, self.pinned = params, pinned
        self._shared = b""
        self._entries: list[Entry] = []
        self._request: bytes | None = None

    @override
    def begin(self, shared: bytes) -> None:
        """Tell what is broadcast for the pass that begins: its digest, b"" for nothing. Before the pass's outbox.

        RuntimeError in the first pass, for which nothing is broadcast beside the model, or once vectors have come.
        """
        if self._is_over or not self._pass or self._entries:
            raise RuntimeError(f"pass {self._pass} is going on; want one after the first, and no vectors yet")
        self._shared = shared

    @override
    def _question(self) -> bytes:
        return self.params.to_json()

    @override
    def _refusal(self, id_: bytes, body: memoryview) -> str:
        said = Abort.read(body)
        return said.code if said.is_of(id_, self.session) else "without a signature"

    @override
    def _take(self, id_: bytes, body: memoryview) -> None:
        size = self._sum.size * self.params.m // 8
        if body.nbytes != _HEAD + size:
            raise Refused("length", f"{body.nbytes} bytes; want {_HEAD + size}, for {self._sum.size} numbers")
        sealed, signature, packed = bytes(body[:SEALED]), bytes(body[SEALED:_HEAD]), body[_HEAD:]
        channel = Channel(self.params.ctx, id_, self._pass, self._shared)
        entry = Entry(id_, vector_text(channel.ctx, self._pass, packed), sealed, signature)
        entry.check(channel)
        agree(_PROBE, sealed[:KEY], id_)
        add_packed(self._sum, packed, self.params.m)
        self._entries.append(entry)

    @override
    def close(self) -> None:
        """No more answers: from now on ``to_helper`` has a request. Called once more, it gives the helper up."""
        super().close()
        if self._request is not None:
            self._fail(ProtocolError("the helper has not answered: the session is lost"))
        if len(self._entries) < self.params.t:
            self._fail(ProtocolError(f"too few: got {len(self._entries)} of {self.params.n}; want {self.params.t}"))
        entries = tuple(sorted(self._entries, key=lambda x: x.id))
        self._request = Request(self.params.to_json(), self._pass, self._shared, entries).to_bytes()

    def _fail(self, error: ProtocolError) -> NoReturn:
        self._is_over, self._request = True, None
        raise error

    @override
    def to_helper(self) -> bytes | None:
        return self._request

    @override
    def from_helper(self, answer: bytes) -> None:
        """Take the sum of the masks. ProtocolError, and the session is over, for an answer to anything else, one that
        the pinned helper has not signed, or a refusal; a ``Refused`` names the client because of whom."""
        if self._request is None:
            raise RuntimeError("nothing was asked of the helper")
        try:
            masks = self._checked(answer, self._request)
        except ProtocolError as error:
            if isinstance(error, Refused) and error.culprit in self._answered:
                self._culprits[error.culprit] = str(error)
            self._fail(error)
        np.subtract(self._sum, masks, out=self._sum)
        reduce(self._sum, self.params.m)
        self._request, self._shared, self._entries = None, b"", []
        self._summed(self._sum)

    def _checked(self, answer: bytes, request: bytes) -> Ring:
        found = read_answer(answer, request)
        if not found.is_signed or (self.pinned and found.helper != self.pinned):
            raise ProtocolError(f"the helper's sum is not signed by {self.pinned.hex()[:8] or 'who sent it'}")
        return unpack(found.packed, self._sum.size, self.params.m)
