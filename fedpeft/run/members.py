"""A client's half of secure aggregation on this node: whose key it has, whom it believes, what it agrees to."""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.channel import RingChannel
from fedpeft.config.ranks import largest_rank
from fedpeft.errors import ConfigError
from fedpeft.flower import Journal, Secure
from fedpeft.run.policies import Credentials, read_credentials
from fedpeft.run.ranks import Assigned, said_by_node
from fedpeft.run.simulated import SIMULATED, simulated_admin, simulated_identity, simulated_roster
from fedpeft.secagg import Policy, Protocol, Roster

if TYPE_CHECKING:
    from fedpeft.run.workshop import Workshop


def member(here: "Workshop", node_config: Mapping[str, bool | int | float | str], state: Path | None) -> Secure | None:
    """What this node brings to secure rounds; None where the run has none.

    node_config: "trust", the file with [trust] and [policy]. Raises ConfigError, naming the key, for a run with secure
    aggregation and a node without it, since no client answers such a run in the clear; and for a run in the clear and a
    node with it: a coordinator that could choose would have what its clients' policies keep from it.
    """
    found = here.found
    if not isinstance(found.secagg, Protocol):
        if "trust" in node_config:
            raise ConfigError(
                "node-config: trust is given, so this node takes part in secure aggregation only, and this run has "
                "secagg.name = 'none'; want a run with a protocol, or trust left out where a server may see each update"
            )
        return None
    assert isinstance(found.channel, RingChannel), "config asks for the ring"
    clients = here.federation.clients
    ranks = Assigned(found.ranks, clients, found.seed, lambda client: said_by_node(here, node_config, client))
    whole = largest_rank(found.adapter)
    common = partial(
        Secure,
        found.run,
        found.settings["secagg"]["name"],
        found.secagg,
        found.channel,
        journal=Journal(state),
        rank=lambda client, round: min(whole, ranks(client, round)),
    )
    if node_config.get(SIMULATED):
        return common(
            identity=lambda client: simulated_identity(found.run, client),
            roster=lambda: _simulated(found.run, clients),
            policy=Policy(),
        )
    if "trust" not in node_config:
        raise ConfigError(
            f"node-config: trust is missing, and this run has secagg.name = {found.settings['secagg']['name']!r}; want "
            f"the file with this client's key, roster, admins and policy: trust='/etc/fedpeft/client.toml' "
            f"(docs/secure-aggregation.md)"
        )
    mine = read_credentials(Path(str(node_config["trust"])), time.time())
    return common(identity=lambda client: mine.identity, roster=lambda: _in_force(mine), policy=mine.policy)


def _simulated(run: str, clients: int) -> Roster:
    roster = simulated_roster(run, clients)
    roster.check({simulated_admin(run).id}, time.time())
    return roster


def _in_force(mine: Credentials) -> Roster:
    mine.check(time.time())
    return mine.roster
