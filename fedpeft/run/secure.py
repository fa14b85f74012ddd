"""A run's rounds under secure aggregation: whose sum is asked for, with which parameters, and what it cost."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from secrets import token_bytes

from fedpeft.adapters import Spec
from fedpeft.channel import RingChannel, Scales
from fedpeft.config import Experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.errors import ConfigError, ProtocolError
from fedpeft.flower import Fleet, OnReply, Terms, Traffic, identities, retried
from fedpeft.report import PhaseRecord, SecureRecord
from fedpeft.rounds import SecureRound
from fedpeft.rules import MeanRule, ServerState
from fedpeft.secagg import Policy, Protocol, Roster
from fedpeft.secagg.terms import LEAST_COHORT

DEPLOYED = Policy(min_cohort=LEAST_COHORT)
"""What a coordinator takes real clients to ask for, whose policies are their own: no cohort that none can agree to."""


@dataclass(slots=True)
class Sessions:
    """Opens and drives the secure rounds of a run.

    roster: who may take part; policy: what the coordinator takes clients to ask for, which each of them holds to by
    itself; helper: asks the second server, where the protocol has one; barred: clients that were found to cheat, who
    are not asked again; scales: of the last round that summed these tensors, pass by pass. No file of the run has them:
    after a resume the first round has the channel's whole range for all tensors again.
    """

    found: Experiment
    roster: Roster
    policy: Policy
    helper: Callable[[bytes], bytes] | None = None
    barred: dict[int, str] = field(default_factory=dict[int, str])
    scales: dict[str, tuple[Scales, ...]] = field(default_factory=dict[str, tuple[Scales, ...]])

    def drive(
        self, fleet: Fleet, state: ServerState, ranks: Mapping[int, int], known: int, on_reply: OnReply
    ) -> tuple[SecureRound, Traffic, SecureRecord]:
        """One round of these clients, by rank. Raises ProtocolError where too few of them can be asked at all."""
        found = self.found
        ids, strangers = identities(fleet, sorted(ranks), found.fleet.patience)
        strangers |= {c: "is not in the roster" for c, x in ids.items() if x not in self.roster.ids}
        rounds: list[SecureRound] = []
        terms = self._terms(fleet)
        layout = terms.layout_hash(state.task)

        def opened(attempt: int, without: frozenset[int]) -> SecureRound:
            cohort = {c: rank for c, rank in ranks.items() if c not in strangers and c not in without}
            halvings = tuple(x.halvings for x in self.scales.get(layout, ()))
            rounds.append(self._open(terms, state, cohort, ids, known, attempt, halvings))
            return rounds[-1]

        deadline, patience = found.selection.deadline, found.fleet.patience
        round, traffic = retried(fleet, opened, deadline, patience, self.helper, on_reply)
        self.scales[layout] = rescaled(round, self.scales.get(layout, ()))
        culprits = {client: why for x in rounds for client, why in x.culprits.items()}
        left_out = {client: why for client, why in culprits.items() if client not in round.ranks}
        round.refused.extend(sorted((strangers | left_out).items()))
        self.barred |= culprits
        threshold = self._protocol.threshold(len(round.ranks))
        return round, traffic, _record(round, traffic, len(rounds), threshold, culprits)

    def cohort(self, clients: Mapping[int, int]) -> dict[int, int]:
        """The rank that each trains at, lowered where too few would share its last directions; without who is barred.

        A client refuses to add to numbers that fewer than ``min_slice`` clients add to, dropouts not counted.
        """
        whole = largest_rank(self.found.adapter)
        asked = {c: min(rank, whole) for c, rank in clients.items() if c not in self.barred}
        return asked if self.found.rule.hides_ranks else shared_ranks(asked, _holders(self.policy))

    def _open(
        self,
        terms: Terms,
        state: ServerState,
        cohort: Mapping[int, int],
        ids: Mapping[int, bytes],
        known: int,
        attempt: int,
        halvings: tuple[tuple[int, ...], ...],
    ) -> SecureRound:
        found, protocol = self.found, self._protocol
        assert isinstance(found.rule, MeanRule), "config asks for a rule of means"
        ranks = self.cohort(cohort)
        mine = {client: ids[client] for client in ranks}
        try:
            params, grid = terms.proposal(
                *(protocol, state, ranks, mine, token_bytes(16), attempt),
                consistency=protocol.is_consistent,
                hides_ranks=found.rule.hides_ranks,
                halvings=halvings,
            )
            session = protocol.server(params, self.roster)
        except ValueError as error:
            raise ProtocolError(f"no session with {len(ranks)} clients: {error}") from error
        quorum = found.selection.least(known)
        return SecureRound(
            *(state, ranks, mine, quorum, grid, session),
            rule=found.rule,
            optimiser=found.server,
            clients=known,
            exactness=terms.exactness,
        )

    def _terms(self, fleet: Fleet) -> Terms:
        found = self.found
        assert isinstance(found.channel, RingChannel), "config asks for the ring"
        return Terms(
            *(found.run, found.settings["secagg"]["name"], found.rule, found.channel, found.weighting.largest),
            *(fleet.base, found.evaluation.exactness, fleet.settings),
        )

    @property
    def _protocol(self) -> Protocol:
        assert isinstance(self.found.secagg, Protocol), "there are no sessions in the clear"
        return self.found.secagg


def check_ranks(found: Experiment, ranks: Collection[int], spec: Spec) -> None:
    """Raise ConfigError for a secure run by whose rule clients of these ranks may be alone in what they add to."""
    if not isinstance(found.secagg, Protocol) or found.rule.hides_ranks or not ranks:
        return
    if not found.rule.is_nested(ranks, spec):
        raise ConfigError(
            f"ranks.name: with {found.settings['rule']['name']} clients of these ranks may each be alone in what they "
            f"add to, which secure aggregation then does not hide; want the same rank for all (the server's, for "
            f"lora_a2), or a rule such as subspace"
        )


def secrecy(found: Experiment, cohort: int) -> tuple[tuple[str, str], ...]:
    """What a run's secure aggregation takes and gives, as (name, text) to print; nothing for a run in the clear."""
    protocol, channel = found.secagg, found.channel
    if not isinstance(protocol, Protocol) or not isinstance(channel, RingChannel):
        return ()
    label, grid = protocol.label(cohort), channel.over(cohort, 1, 0, found.weighting.largest)
    return (
        ("secure", f"{label.name}: hides {label.hides}"),
        ("to the end", f"{protocol.threshold(cohort)} of {cohort} clients; up to {label.corrupt:.0%} may be corrupt"),
        (
            "a number",
            f"{grid.bits} bits of a ring of {channel.modulus}, in steps of {grid.rounding:.2g} up to {channel.range:g} "
            f"(times weight / {found.weighting.largest:g})"
            + (", and finer for tensors of small changes after the first round" if channel.scales == "tensor" else ""),
        ),
    )


def shared_ranks(ranks: Mapping[int, int], least: int) -> dict[int, int]:
    """Ranks of which the highest is had by at least so many clients: those of a rank that too few have go down to the
    next. Where there are fewer clients than that, all have the lowest.

    So nobody's last directions are summed with those of too few others.
    """
    out = dict(ranks)
    while out:
        top = max(out.values())
        lower = [rank for rank in out.values() if rank < top]
        if len(out) - len(lower) >= least or not lower:
            return out
        out = {client: min(rank, max(lower)) for client, rank in out.items()}
    return out


def _holders(policy: Policy) -> int:
    """How many have to begin with a rank so that enough are left when as many are lost as may be."""
    count = policy.min_slice
    while int(count * (1 - policy.max_dropout) + 1e-9) < policy.min_slice:
        count += 1
    return count


def rescaled(round: SecureRound, had: tuple[Scales, ...]) -> tuple[Scales, ...]:
    """The scales for the next round of these tensors; those of this one where it has failed, or has only one."""
    if len(round.seen) < round.rule.passes or not all(x.leaves for x in round.grid):
        return had
    had = had or tuple(Scales(x.halvings) for x in round.grid)
    return tuple(scales.after(seen) for scales, seen in zip(had, round.seen, strict=True))


def _record(
    round: SecureRound, traffic: Traffic, attempts: int, threshold: int, culprits: Mapping[int, str]
) -> SecureRecord:
    phases: dict[str, PhaseRecord] = {}
    for leg in traffic.legs:
        name = leg.name if round.rule.passes == 1 or leg.name in ("keys", "shares") else f"{leg.name} {leg.pass_ + 1}"
        had = phases.get(name, PhaseRecord())
        phases[name] = PhaseRecord(
            had.asked + leg.asked,
            had.answered + leg.answered,
            had.bytes_up + leg.bytes_up,
            had.bytes_down + leg.bytes_down,
            had.seconds + leg.seconds,
        )
    survivors = len(round.session.survivors)
    numbers = survivors * sum(x.size for x in round.grid)
    return SecureRecord(attempts, threshold, round.saturated, numbers, culprits, phases)
