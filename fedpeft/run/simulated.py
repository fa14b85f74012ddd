"""What stands in for other people in a simulation: keys of clients and of a second server, and clients that vanish.

All keys are made from the name of the run, which its files hold, so they protect nobody: a simulated run has the
messages and the arithmetic of secure aggregation, and no security.
"""

import time
from functools import lru_cache
from hashlib import sha256

from fedpeft.config import Experiment
from fedpeft.flower import Losses
from fedpeft.run.secure import Sessions
from fedpeft.secagg import Full, Identity, Member, Policy, Protocol, Roster
from fedpeft.secagg.helper import Helper, HelperKey, InMemory

SIMULATED = "simulated-keys"
"""The node config of clients that live in their coordinator's own process, which makes their keys."""


def sessions(found: Experiment, clients: int) -> Sessions | None:
    """The secure sessions of a simulated run, with a second server in this process; None for a run in the clear."""
    if not isinstance(found.secagg, Protocol):
        return None
    roster = simulated_roster(found.run, clients)
    helper = Helper(_helper(found.run), roster, {simulated_admin(found.run).id}, Policy(), InMemory())

    return Sessions(found, roster, Policy(), lambda question: helper.answer(question, time.time()).answer)


def losses(found: Experiment, clients: int) -> Losses | None:
    """Which clients vanish in which rounds; None where none do.

    A round has the steps of ``full``, whatever it runs: keys, shares, and for each pass vectors, survivors and unmask.
    In the clear a pass has one message, which is there for whoever has not vanished before the vectors.
    """
    terms, passes = found.simulation.losses, found.rule.passes
    if terms is None:
        return None
    every = Full().questions(passes)
    vectors = tuple(at for at, name in enumerate(every) if name == "vectors")
    secure = vectors
    if isinstance(found.secagg, Protocol):
        left = iter(enumerate(every))
        secure = tuple(next(at for at, name in left if name == asked) for asked in found.secagg.questions(passes))
    return Losses(terms.count(clients), clients, found.seed, len(every), vectors, secure)


@lru_cache(maxsize=1)
def simulated_roster(run: str, clients: int) -> Roster:
    """The roster of a run whose clients are all simulated, signed by an admin that is simulated as well."""
    members = tuple(Member(simulated_identity(run, client).id) for client in range(clients))
    return Roster(members, _helper(run).public).signed(simulated_admin(run))


def simulated_admin(run: str) -> Identity:
    """The key that signs the roster of a simulated run."""
    return _identity(run, "admin")


@lru_cache(maxsize=4096)
def simulated_identity(run: str, client: int) -> Identity:
    """The key of a simulated client."""
    return _identity(run, f"client {client}")


def _helper(run: str) -> HelperKey:
    return HelperKey.of(_seed(run, "helper"))


def _identity(run: str, who: str) -> Identity:
    return Identity.of(_seed(run, who))


def _seed(run: str, who: str) -> bytes:
    return sha256(f"fedpeft simulated key of {who} in run {run}".encode()).digest()
