"""A client in a session, state by state: each has one step, from what the server sends to the next state and an answer.

A step that was made can't be made again: the state that could is gone. Which kind of share is given out for whom is
worked out here and never asked for, so no message gets both of one owner.
Source: Bonawitz et al., CCS 2017, figure 4; several passes, each with mask keys and seeds of its own: suite FP-SA-1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedpeft.secagg import transcript
from fedpeft.secagg.graph import neighbours
from fedpeft.secagg.identity import Identity, verify
from fedpeft.secagg.masks import Mask, add_masks
from fedpeft.secagg.messages import Advert, Dealt, Opened, Parcel, is_ascending
from fedpeft.secagg.params import Params
from fedpeft.secagg.policy import Policy, slice_is_safe
from fedpeft.secagg.protocol import Entropy, Refused, Ring
from fedpeft.secagg.ring import pack, reduce
from fedpeft.secagg.shamir import split

Both = tuple[bytes, bytes]
_NONCE: Final = bytes(12)  # each key seals one message


@dataclass(frozen=True, slots=True)
class Advertised:
    """A client that has made its keys of the session. box, masks: private keys; ``masks`` has one for each pass."""

    params: Params
    box: bytes = field(repr=False)
    masks: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def begin(cls, params: Params, me: Identity, entropy: Entropy) -> tuple[Self, Advert]:
        """Fresh keys, and what the others are told of them."""
        box, *masks = (_drawn(entropy) for _ in range(1 + len(params.dims)))
        keys = [transcript.public_of(x) for x in (box, *masks)]
        signature = me.sign(transcript.advert_text(params.ctx, keys))
        return cls(params, box, tuple(masks)), Advert(me.id, keys[0], tuple(keys[1:]), signature)

    def share(
        self, adverts: Sequence[Advert], me: Identity, policy: Policy, entropy: Entropy
    ) -> tuple["Shared", Dealt]:
        """Check everyone's keys, then give each neighbour a share of each secret.

        Refused for a list that is too short, out of order or has strangers in it, for keys twice, for a signature that
        is not of this session, and for keys of mine that are not mine.
        """
        self._check(adverts, me, policy)
        th1 = transcript.first(self.params.ctx, [x.parts for x in adverts])
        ids = tuple(x.id for x in adverts)
        near = neighbours(ids, self.params.k, th1)[me.id]
        holders = sorted((*near, me.id))
        points = range(1, len(holders) + 1)
        seeds = tuple(_drawn(entropy) for _ in self.masks)
        dealt = [  # [pass][kind][holder]
            [split(secret, self.params.t, points, entropy) for secret in (b, s)]
            for b, s in zip(seeds, self.masks, strict=True)
        ]
        of = {v: tuple((b[i], s[i]) for b, s in dealt) for i, v in enumerate(holders)}
        keys = {x.id: x for x in adverts}
        sealed, box = [], transcript.private(self.box)
        for v in near:
            key = transcript.sealing_key(box, keys[v].box, th1, me.id, v, v)
            plain = Opened(holders.index(v) + 1, of[v]).to_bytes()
            sealed.append(ChaCha20Poly1305(key).encrypt(_NONCE, plain, th1 + me.id + v))
        commitments = tuple(
            tuple(_committed(th1, me.id, v, of[v][p], p) for v in holders) for p in range(len(self.masks))
        )
        opened = tuple(transcript.seed_commitment(th1, me.id, seed, p) for p, seed in enumerate(seeds))
        answer = Dealt(tuple(sealed), opened, commitments, b"")
        signature = me.sign(transcript.shares_text(th1, answer.commitments))
        peers = {v: keys[v].keys for v in near}
        secrets = tuple(zip(seeds, self.masks, strict=True))
        return Shared(self.params, th1, ids, peers, self.box, secrets, of[me.id]), replace(answer, signature=signature)

    def _check(self, adverts: Sequence[Advert], me: Identity, policy: Policy) -> None:
        ids = [x.id for x in adverts]
        _check_floor(len(ids), self.params, policy)
        if not is_ascending(ids) or not set(ids) <= set(self.params.ids):
            raise Refused("members", "the keys are out of order, or have somebody twice or from outside the cohort")
        own = next((x for x in adverts if x.id == me.id), None)
        if own is None or own.keys != tuple(transcript.public_of(x) for x in (self.box, *self.masks)):
            raise Refused("own-keys", "the list of keys does not have mine as I made them")
        seen: set[bytes] = set()
        ctx = self.params.ctx
        for one in adverts:
            for key in one.keys:
                transcript.check_form(key, one.id)
                if key in seen:
                    raise Refused("key-twice", f"{one.id.hex()[:8]} has a key that is another's as well", one.id)
                seen.add(key)
            if not verify(one.id, one.signature, transcript.advert_text(ctx, one.keys)):
                raise Refused("key-signature", f"the keys of {one.id.hex()[:8]} are not signed by it for this session")


@dataclass(frozen=True, slots=True)
class Shared:
    """A client that has dealt its shares and, meanwhile, trains.

    ids: whose keys are in the first transcript; peers: the public keys of each neighbour; secrets: (seed, mask key) of
    each pass; own: the shares it holds of its own secrets.
    """

    params: Params
    th1: bytes
    ids: tuple[bytes, ...]
    peers: Mapping[bytes, tuple[bytes, ...]]
    box: bytes = field(repr=False)
    secrets: tuple[Both, ...] = field(repr=False)
    own: tuple[Both, ...] = field(repr=False)

    def open(self, parcels: Sequence[Parcel], me: bytes) -> "Ready":
        """Open what neighbours have dealt. Refused, naming the owner, for what doesn't open or isn't as committed."""
        owners = [x.owner for x in parcels]
        if not is_ascending(owners) or not set(owners) <= set(self.peers):
            raise Refused("senders", "sealed shares are out of order, twice, or from somebody who is no neighbour")
        if len(owners) + 1 < self.params.t:
            raise Refused("few", f"{len(owners) + 1} of my holders have dealt shares; want at least {self.params.t}")
        around = neighbours(self.ids, self.params.k, self.th1)
        held, box = {me: self.own}, transcript.private(self.box)
        for parcel in parcels:
            u = parcel.owner
            opened = self._opened(parcel, box, me)
            if opened.point != sorted((*around[u], u)).index(me) + 1:
                raise Refused("share", f"{u.hex()[:8]} dealt a share that is not mine", u)
            fits = [_committed(self.th1, u, me, both, p) for p, both in enumerate(opened.shares)]
            if tuple(fits) != parcel.commitments:
                raise Refused("share", f"{u.hex()[:8]} dealt another share than it has committed to", u)
            held[u] = opened.shares
        known = set(self.ids) - set(self.peers) | set(held)
        return Ready(
            Ongoing(
                params=self.params,
                th1=self.th1,
                pass_=0,
                members=tuple(x for x in self.ids if x in known),
                held=held,
                keys={u: self.peers[u][1:] for u in owners},
                secrets=self.secrets,
            )
        )

    def _opened(self, parcel: Parcel, box: X25519PrivateKey, me: bytes) -> Opened:
        u = parcel.owner
        key = transcript.sealing_key(box, self.peers[u][0], self.th1, u, me, u)
        try:
            plain = ChaCha20Poly1305(key).decrypt(_NONCE, parcel.sealed, self.th1 + u + me)
        except InvalidTag:
            raise Refused("sealed", f"the sealed shares of {u.hex()[:8]} don't open", u) from None
        return Opened.read(plain, len(self.secrets))


@dataclass(frozen=True, slots=True)
class Ongoing:
    """What a client has in hand from pass to pass.

    members: who can be in the sum of this pass, as far as it knows; held: its shares of each owner's (seed, mask key),
    for this pass and each later one; keys: each neighbour's public mask keys, and secrets: its own (seed, mask key),
    for the passes that it has yet to mask.
    """

    params: Params
    th1: bytes
    pass_: int
    members: tuple[bytes, ...]
    held: Mapping[bytes, tuple[Both, ...]] = field(repr=False)
    keys: Mapping[bytes, tuple[bytes, ...]]
    secrets: tuple[Both, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Ready:
    """A client whose vector of this pass is wanted."""

    now: Ongoing

    def mask(self, vector: Ring, shared: bytes, me: Identity) -> tuple["Masked", bytes, bytes]:
        """The masked vector, packed, and a signature on it. The keys that masked it are gone afterwards.

        vector: shape (dims[pass_],), below 2^m. shared: the digest of what was broadcast for this pass.
        """
        now = self.now
        suffix = transcript.of_pass(now.pass_, shared)
        seed, secret = now.secrets[0]
        mine = transcript.private(secret)
        masks = [Mask(transcript.self_key(seed, now.th1, me.id, suffix), 1)]
        for v, keys in now.keys.items():
            key = transcript.pair_key(mine, keys[0], now.th1, me.id, v, suffix)
            masks.append(Mask(key, transcript.pair_sign(me.id, v)))
        masked = vector.copy()
        add_masks(masked, masks)
        reduce(masked, now.params.m)
        packed = pack(masked, now.params.m)
        later = replace(now, keys={v: keys[1:] for v, keys in now.keys.items()}, secrets=now.secrets[1:])
        return Masked(later, shared), packed, me.sign(transcript.vector_text(now.th1, now.pass_, packed))


@dataclass(frozen=True, slots=True)
class Masked:
    """A client that has sent its vector of a pass. shared: the digest of what was broadcast for the pass."""

    now: Ongoing
    shared: bytes

    def agree(self, survivors: Sequence[bytes], me: bytes, policy: Policy) -> "Agreed":
        """Settle on who survived. Refused for a list out of order, with strangers, without me, or that is too short."""
        now = self.now
        if not is_ascending(survivors) or not set(survivors) <= set(now.members):
            raise Refused("survivors", "the survivors are out of order, twice, or not all from those who could survive")
        if me not in survivors:
            raise Refused("survivors", "I have sent my vector, and I'm not among the survivors")
        _check_floor(len(survivors), now.params, policy)
        holders = sum(u in now.held for u in survivors)
        if holders < now.params.t:
            raise Refused("few", f"{holders} of my holders survive; want at least {now.params.t}")
        if not slice_is_safe(now.params, survivors, me, policy):
            raise Refused(
                "slice", f"fewer than {policy.min_slice} survivors add to all that I add to, or have my model"
            )
        return Agreed(now, self.shared, tuple(survivors))


@dataclass(frozen=True, slots=True)
class Agreed:
    """A client that has settled on who survived a pass, and gives out its shares once."""

    now: Ongoing
    shared: bytes
    survivors: tuple[bytes, ...]

    @property
    def text(self) -> bytes:
        """What everyone signs who has been told the same."""
        return transcript.survivors_text(self.now.th1, self.now.pass_, self.shared, self.survivors)

    def check(self, signatures: Sequence[tuple[bytes, bytes]]) -> None:
        """Refused unless enough of those who survive, and hold my shares, were told of the same survivors."""
        signers = [signer for signer, _ in signatures]
        if not is_ascending(signers) or not set(signers) <= set(self.survivors) & set(self.now.held):
            raise Refused("signers", "signatures are out of order, twice, or not from survivors that hold my shares")
        if len(signers) < self.now.params.t:
            raise Refused("few", f"{len(signers)} signatures on the survivors; want at least {self.now.params.t}")
        for signer, signature in signatures:
            if not verify(signer, signature, self.text):
                raise Refused("inconsistent", f"{signer.hex()[:8]} was told of other survivors than I: inconsistent")

    def unmask(self) -> tuple[Ready | None, tuple[bytes, ...]]:
        """A share for each owner, ascending: of the seed of who survived, and of the mask key of who did not.

        The state after it has nothing of this pass; None after the last.
        """
        now, alive = self.now, set(self.survivors)
        shares = tuple(both[0][0 if u in alive else 1] for u, both in sorted(now.held.items()))
        if not now.secrets:
            return None, shares
        held = {u: both[1:] for u, both in now.held.items() if u in alive}
        keys = {u: keys for u, keys in now.keys.items() if u in alive}
        later = replace(now, pass_=now.pass_ + 1, members=self.survivors, held=held, keys=keys)
        return Ready(later), shares


def _committed(th1: bytes, owner: bytes, holder: bytes, both: Both, pass_: int) -> Both:
    return (
        transcript.share_commitment("b", th1, owner, holder, both[0], pass_),
        transcript.share_commitment("s", th1, owner, holder, both[1], pass_),
    )


def _check_floor(count: int, params: Params, policy: Policy) -> None:
    least = max(params.t, policy.fewest(params.n))
    if count < least:
        raise Refused("few", f"{count} clients are left; want at least {least} of {params.n}")


def _drawn(entropy: Entropy) -> bytes:
    found = entropy(transcript.KEY)
    if len(found) != transcript.KEY:
        raise ValueError(f"entropy gave {len(found)} bytes; want {transcript.KEY}")
    return found
