"""Which client has which rank in a run, and what can't be run with so many clients or with these ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpeft.adapters import Spec
from fedpeft.config import Experiment
from fedpeft.config.ranks import largest_rank
from fedpeft.config.secure import check_cohort
from fedpeft.data import Federation
from fedpeft.errors import ConfigError
from fedpeft.rounds import WHOLE, Column, Memory, Ranks, bytes_in
from fedpeft.rules import Krum, ListRule, MeanRule, Median, PersonalList, PersonalMean, TrimmedMean
from fedpeft.run.needs import CARRIER, Needs, fitting_on_device
from fedpeft.secagg import Policy
from fedpeft.training.environment import memory
from fedpeft.training.kit import Kit

if TYPE_CHECKING:
    from fedpeft.run.workshop import Workshop


@dataclass(frozen=True, slots=True)
class Assigned:
    """The rank of a client in a round. said: of a client that says its own; one that says none trains whole layers."""

    ranks: Ranks
    clients: int
    seed: int
    said: Callable[[int], int | None]

    def __call__(self, client: int, round: int) -> int:
        if not self.ranks.is_said:
            return self.ranks.of(client, self.clients, self.seed, round)
        found = self.said(client)
        return WHOLE if found is None else found


def said_by_node(here: "Workshop", node_config: Mapping[str, bool | int | float | str], client: int) -> int | None:
    """What a node says of its rank; None where that is not for it to say. Raises ConfigError naming the key."""
    ranks = here.found.ranks
    if not ranks.is_said:
        return None
    if "rank" in node_config:
        rank, largest = node_config["rank"], largest_rank(here.found.adapter)
        if type(rank) is not int or not 1 <= rank <= largest:
            raise ConfigError(f"node-config: rank is {rank!r}; want 1 to {largest}, the server's (adapter.rank)")
        return rank
    if not isinstance(ranks, Memory):
        return rank_in(here.federation, client)
    try:
        holds = bytes_in(node_config["memory"], "memory") if "memory" in node_config else float(memory()["total"])
    except ValueError as error:
        raise ConfigError(f"node-config: {error}") from None
    rows = here.counts(client).train
    if here.own is not None and here.own.engine == "onnx" and here.own.kit is not None:
        kit, room = Kit.open(here.own.kit, check=False), holds - CARRIER["onnx"]
        return fitting_on_device(kit, here.found.training, ranks.levels, rows, room)
    return Needs(here.trainer).fitting(ranks.levels, rows, holds - CARRIER["torch"])


def rank_in(federation: Federation, client: int) -> int:
    """The rank that a client's rows say it has. Raises ConfigError where they don't agree."""
    ranks = federation.table.ranks
    assert ranks is not None, "a workshop reads the column"
    parts = (federation.rows(client, "train"), federation.rows(client, "validation"), federation.rows(client, "test"))
    found = sorted({ranks[int(i)] for rows in parts for i in rows})
    if len(found) != 1:
        raise ConfigError(
            f"ranks.column: the rows of client {client} have {len(found)} ranks, {', '.join(map(str, found[:5]))}; "
            f'want one a client: clients by nature (partition.name = "natural"), or ranks.name = "listed"'
        )
    return found[0]


def check_column(ranks: Ranks, largest: int, found: tuple[int, ...] | None) -> None:
    """Raise ConfigError where a column has a larger rank than the server."""
    if found is not None and isinstance(ranks, Column) and max(found) > largest:
        raise ConfigError(
            f"ranks.column: {ranks.column!r} has a rank of {max(found)}; the server's is {largest}: want at most that, "
            f"or a larger adapter.rank"
        )


def check_clients(found: Experiment, clients: int, policy: Policy | None = None) -> None:
    """Raise ConfigError, naming the key, for what can't be run with so many clients.

    policy: the least that they ask for under secure aggregation, what is usual if not given.
    """
    found.ranks.check(clients)
    check_cohort(found, clients, policy)
    terms = found.simulation.hostile
    if terms is not None and terms.count(clients) < 1:
        raise ConfigError(
            f"simulation.hostile.share: got {terms.share:g}, which is less than one of {clients} clients; want more, "
            f"or [simulation.hostile] left out"
        )
    rule, name = inner(found.rule), found.settings["rule"]["name"]
    if isinstance(rule, Krum):
        cohort = found.selection.wanted(clients)
        hostile = rule.hostile(cohort)
        if hostile and cohort <= 2 * hostile + 2:
            raise ConfigError(
                f"rule.share: got {rule.share:g}, which is {hostile} of a round's {cohort} clients, and {name} wants "
                f"more than {2 * hostile + 2} then; want a smaller share, a larger selection.count, or median"
            )


def check_spec(found: Experiment, spec: Spec) -> None:
    """Raise ConfigError, naming the key, for ranks that can't be had with this adapter."""
    factors = {name for name, _ in spec.factors("ab").shapes}
    kept = sorted(factors & found.rule.personal(spec))
    if found.ranks.changes and kept:
        raise ConfigError(
            f"ranks.redraw: got true, and clients keep {kept[0]} and {len(kept) - 1} more at the rank that they had; "
            f"want false, or a rule that keeps no factor on the client"
        )


def check_holders(found: Experiment, ranks: list[int]) -> None:
    """Raise ConfigError for a rule that would never move what few of these clients, by rank, hold."""
    rule, name = inner(found.rule), found.settings["rule"]["name"]
    least = 0.5 if isinstance(rule, Median) else rule.share if isinstance(rule, TrimmedMean) else 0.0
    top = largest_rank(found.adapter)
    holders = sum(rank >= top for rank in ranks) / max(len(ranks), 1)
    if ranks and least and holders <= least:
        moved = sorted(min(x, top) for x in ranks)[-int(least * len(ranks)) - 1]
        raise ConfigError(
            f"rule.name: {name} never moves a direction that at most {least:.0%} of the clients hold, and "
            f"{holders:.0%} have the server's rank of {top}; want adapter.rank = {moved}, which enough of "
            f"them have, or a mean rule"
        )


def inner(rule: MeanRule | ListRule) -> MeanRule | ListRule:
    """The rule that what stays on the client is hidden from."""
    return rule.rule if isinstance(rule, PersonalMean | PersonalList) else rule
