"""What the server knows of a session once keys and shares are there: who holds what of whom."""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedpeft.secagg import transcript
from fedpeft.secagg.graph import neighbours
from fedpeft.secagg.messages import Advert, Dealt, Parcel
from fedpeft.secagg.params import Params
from fedpeft.secagg.shamir import SIZE as SHARE
from fedpeft.secagg.transcript import Kind


@dataclass(frozen=True, slots=True, eq=False)
class Dealing:
    """Whose keys are fixed, who is whose neighbour, and what each has dealt.

    adverts: of everyone whose keys are in the first transcript, ascending; dealt: of those who have dealt shares.
    """

    params: Params
    adverts: Mapping[bytes, Advert]
    th1: bytes
    around: Mapping[bytes, tuple[bytes, ...]]
    holders: Mapping[bytes, tuple[bytes, ...]]
    dealt: dict[bytes, Dealt] = field(default_factory=dict)

    @classmethod
    def of(cls, params: Params, adverts: Iterable[Advert]) -> "Dealing":
        """The neighbours that these keys give."""
        by_id = {x.id: x for x in sorted(adverts, key=lambda x: x.id)}
        th1 = transcript.first(params.ctx, (x.parts for x in by_id.values()))
        around = neighbours(tuple(by_id), params.k, th1)
        holders = {u: tuple(sorted((*near, u))) for u, near in around.items()}
        return cls(params, by_id, th1, around, holders)

    def point(self, owner: bytes, holder: bytes) -> int:
        """At which point a holder has its shares of an owner's secrets: from 1 on, ascending by id."""
        return bisect_left(self.holders[owner], holder) + 1

    def parcels(self, holder: bytes, members: Collection[bytes]) -> bytes:
        """What was dealt to one holder by those of its neighbours who are members, ascending."""
        rows = []
        for u in self.around[holder]:
            if u in members:
                dealt, place = self.dealt[u], self.point(u, holder) - 1
                sealed = dealt.sealed[bisect_left(self.around[u], holder)]
                rows.append(Parcel(u, sealed, tuple(of_pass[place] for of_pass in dealt.shares)).to_bytes())
        return b"".join(rows)

    def owners(self, holder: bytes, members: Collection[bytes]) -> list[bytes]:
        """Of whose secrets a holder has shares, ascending."""
        return [u for u in self.holders[holder] if u in members]

    def fits(self, kind: Kind, owner: bytes, holder: bytes, share: bytes, pass_: int) -> bool:
        """Whether a share is what its owner has committed to."""
        committed = self.dealt[owner].shares[pass_][self.point(owner, holder) - 1][kind == "s"]
        return len(share) == SHARE and committed == transcript.share_commitment(
            kind, self.th1, owner, holder, share, pass_
        )

    def lacking(self, owners: Iterable[bytes], answering: Collection[bytes]) -> list[bytes]:
        """The owners of whose secrets too few of those who answer hold shares."""
        return [u for u in owners if sum(v in answering for v in self.holders[u]) < self.params.t]

    def core(self, ids: Sequence[bytes]) -> tuple[bytes, ...]:
        """The largest set of these in which everyone has enough holders, ascending."""
        left = set(ids)
        while lacking := self.lacking(left, left):
            left.difference_update(lacking)
        return tuple(sorted(left))
