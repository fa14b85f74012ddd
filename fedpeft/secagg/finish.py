"""The end of a pass: shares become secrets, secrets become masks, and masks come off the sum."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from fedpeft.errors import ProtocolError
from fedpeft.secagg import transcript
from fedpeft.secagg.dealing import Dealing
from fedpeft.secagg.masks import Mask, add_masks
from fedpeft.secagg.protocol import Refused, Ring
from fedpeft.secagg.ring import reduce
from fedpeft.secagg.shamir import combine
from fedpeft.secagg.transcript import Kind

_TOGETHER: Final = 1024  # masks at a time: each holds a cipher's state


@dataclass(slots=True, eq=False)
class Unmasking:
    """The shares that come in for a pass, each checked when it comes.

    members: who others may have masked with; survivors: those of them whose vectors are in the sum. Of a survivor the
    seed is wanted, of any other the mask key, never both.
    """

    dealing: Dealing
    pass_: int
    shared: bytes
    members: tuple[bytes, ...]
    survivors: tuple[bytes, ...]
    _alive: frozenset[bytes] = field(init=False, repr=False)
    _shares: dict[bytes, list[tuple[int, bytes]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._alive = frozenset(self.survivors)

    def kind(self, owner: bytes) -> Kind:
        """Which of an owner's secrets is wanted."""
        return "b" if owner in self._alive else "s"

    def take(self, holder: bytes, shares: Sequence[bytes]) -> None:
        """One holder's shares, along its owners. Those that are as committed to are kept.

        Refused, naming the holder, if any is not: it had accepted what it was dealt.
        """
        bad = 0
        for owner, share in zip(self.dealing.owners(holder, self.members), shares, strict=True):
            if self.dealing.fits(self.kind(owner), owner, holder, share, self.pass_):
                self._shares.setdefault(owner, []).append((self.dealing.point(owner, holder), share))
            else:
                bad += 1
        if bad:
            raise Refused("tampered", f"{holder.hex()[:8]} sent {bad} shares that are not those it was dealt", holder)

    def finish(self, total: Ring) -> None:
        """Take all masks off the sum, in place. ProtocolError for too few shares; Refused, with the culprit, where an
        owner's shares don't give what it had committed to."""
        masks = self.masks()
        for i in range(0, len(masks), _TOGETHER):
            add_masks(total, masks[i : i + _TOGETHER])
        reduce(total, self.dealing.params.m)

    def masks(self) -> list[Mask]:
        """What takes the masks off: the survivors' own, and those that they share with members who did not survive."""
        suffix, th1 = transcript.of_pass(self.pass_, self.shared), self.dealing.th1
        found = []
        for u in self.members:
            secret = self._secret(u)
            if u in self._alive:
                found.append(Mask(transcript.self_key(secret, th1, u, suffix), -1))
                continue
            mine = transcript.private(secret)
            for v in self.dealing.around[u]:
                if v in self._alive:
                    theirs = self.dealing.adverts[v].masks[self.pass_]
                    key = transcript.pair_key(mine, theirs, th1, u, v, suffix)
                    found.append(Mask(key, transcript.pair_sign(u, v)))  # as u would have: v's is the opposite
        return found

    def _secret(self, owner: bytes) -> bytes:
        shares, t = self._shares.get(owner, []), self.dealing.params.t
        if len(shares) < t:
            raise ProtocolError(f"{len(shares)} good shares of what {owner.hex()[:8]} dealt; want at least {t}")
        try:
            secret = combine(shares, t)
        except ProtocolError:
            secret = None
        if secret is None or not self._is_as_committed(owner, secret):
            text = f"{owner.hex()[:8]} dealt shares that don't give what it had committed to"
            raise Refused("dealer", text, owner)
        return secret

    def _is_as_committed(self, owner: bytes, secret: bytes) -> bool:
        if self.kind(owner) == "s":
            return transcript.public_of(secret) == self.dealing.adverts[owner].masks[self.pass_]
        committed = self.dealing.dealt[owner].seeds[self.pass_]
        return committed == transcript.seed_commitment(self.dealing.th1, owner, secret, self.pass_)
