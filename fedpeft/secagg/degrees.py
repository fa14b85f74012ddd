"""How many neighbours a client needs, and how many of them must answer.

Whoever is corrupt or lost is so in a share of the cohort that is chosen before the ring's order is known, so a
client's neighbours are a draw without replacement. Source: Bell, Bonawitz, Gascón, Lepoint, Raykova, CCS 2020,
section 3 and appendix; the bound on the ring's gaps as in Google's federated-compute (graph_parameter_finder).
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_NEARLY: Final = 1e-14  # so that 0.05 of 100 is 5, and not 4.999...


@dataclass(frozen=True, slots=True)
class Degrees:
    """k: neighbours of each client, even; least_threshold to largest_threshold: the thresholds that will do."""

    k: int
    least_threshold: int
    largest_threshold: int


def degrees(n: int, corrupt: float, dropouts: float, malicious: bool, sigma: int = 40, eta: int = 30) -> Degrees:
    """The least number of neighbours with which a cohort of n is safe but for 2^-sigma, and finishes but for 2^-eta.

    corrupt: the share of clients that may tell the server all they know, or do what it says; dropouts: the share that
    may be lost; malicious: whether the server may tell clients different things, for which 2 · threshold > k + corrupt
    neighbours, as nobody may get both kinds of shares of one client. Safe: nobody has ``threshold`` corrupt
    neighbours, and the honest who stay are connected.
    ValueError where no k below n - 1 will do: the graph must then be full.
    """
    if n < 2 or min(corrupt, dropouts) < 0 or not corrupt + dropouts < 1:
        raise ValueError(
            f"n = {n}, corrupt = {corrupt}, dropouts = {dropouts}; want at least 2 clients, and shares that leave some"
        )
    bad = math.floor((corrupt + _NEARLY) * n)
    lost = math.floor((dropouts + _NEARLY) * n)
    stay = math.ceil((1 - dropouts - _NEARLY) * n)
    factorials = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    unsafe, unfinished = 2.0 ** -(sigma + 1) / n, 2.0**-eta / n
    for k in range(2, n - 1, 2):
        if _gap(n, bad + lost, k, factorials) >= -(sigma + 1) * math.log(2):
            continue
        chance = _chances(n, bad, k, factorials)
        more = np.append(np.cumsum(chance[::-1])[::-1][1:], 0.0)  # more[x]: of more than x corrupt neighbours
        worst = int(np.argmax(more <= unsafe))
        if malicious:
            worst = math.ceil((worst + k - 1.25) / 2)
        fewer = np.cumsum(_chances(n, stay, k, factorials))  # fewer[x]: of x neighbours who stay, or fewer
        largest = int(np.searchsorted(fewer, unfinished))
        least = max(worst + 1, 2)
        if largest >= least:
            return Degrees(k, least, largest)
    raise ValueError(
        f"no number of neighbours below {n - 1} is enough for {n} clients of whom {corrupt:.0%} are corrupt and "
        f"{dropouts:.0%} are lost; take the full graph, or a larger cohort"
    )


def _gap(n: int, bad: int, k: int, factorials: NDArray[np.float64]) -> float:
    """The logarithm of a bound on the chance that two gaps of k / 2 in a row split the ring of those who are left."""
    if k > bad:
        return -math.inf
    places = math.log(n) + math.log(n - k - 1) - math.log(2)
    return float(places + factorials[bad] - factorials[bad - k] + factorials[n - k] - factorials[n])


def _chances(n: int, marked: int, k: int, factorials: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance of each number of marked ones, 0 to k, among k of n (hypergeometric): shape (k + 1,)."""
    x = np.arange(max(0, k + marked - n), min(k, marked) + 1)
    f = factorials
    found = np.zeros(k + 1)
    found[x] = np.exp(
        (f[marked] - f[x] - f[marked - x])
        + (f[n - marked] - f[k - x] - f[n - marked - k + x])
        - (f[n] - f[k] - f[n - k])
    )
    return found
