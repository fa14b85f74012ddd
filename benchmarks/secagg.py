"""What secure aggregation costs: sessions, masks at the limit, and the primitives of flwr's SecAgg+ beside ours.

Run: python benchmarks/secagg.py [--try] [name of a session, "limit" or "flwr" ...]

All parts without a name, and only then are results kept. With --try everything is small and nothing is kept. A
session is one process, in which server and clients take turns, so its times are those of one core. flwr's primitives
are those that its own client and server call (flwr.common.secure_aggregation), and take turns with ours.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256, ChaCha20
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import generate_key_pairs, private_key_to_bytes
from measure import HERE, save
from sessions import CASES

from fedpeft.secagg.masks import CIPHERS, Mask, add_masks
from fedpeft.secagg.protocol import Ring
from fedpeft.secagg.shamir import _at_zero, combine, split

NUMBERS, NEIGHBOURS = 10_000_000, 20
"""The limit: so many numbers, and masks with so many neighbours and one of the client itself."""

BUFFER = 2**17
REPEATS = 5
RANGE = 2**32  # flwr's default range of masks
Row = dict[str, Any]


def best(repeats: int, *ways: Callable[[], object]) -> list[float]:
    """The least seconds of each, in turns."""
    found = [float("inf")] * len(ways)
    for _ in range(repeats):
        for i, way in enumerate(ways):
            at = perf_counter()
            way()
            found[i] = min(found[i], perf_counter() - at)
    return found


def masked(vector: Ring, masks: Sequence[Mask], cipher: str, threads: int) -> None:
    """The masks added, by threads that have a slice each."""
    cuts = [vector.size * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(add_masks, vector[a:b], masks, cipher, a) for a, b in pairwise(cuts)]
        for job in jobs:
            job.result()


def streamed(cipher: str, size: int, threads: int) -> None:
    """So many bytes of the cipher's stream into one buffer a thread, and nothing done with them."""

    def run() -> None:
        algorithm = AES256(bytes(32)) if cipher == "aes256" else ChaCha20(bytes(32), bytes(16))
        stream = Cipher(algorithm, CTR(bytes(16)) if cipher == "aes256" else None).encryptor()
        zeros, buffer = bytes(BUFFER), bytearray(BUFFER + 64)
        for _ in range(size // threads // BUFFER):
            stream.update_into(zeros, buffer)

    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(run) for _ in range(threads)]:
            job.result()


def limit(numbers: int) -> list[Row]:
    """A client's masks on a large vector, against the cipher's own rate."""
    vector = np.zeros(numbers, np.uint32)
    masks = [Mask(os.urandom(32), (-1) ** i) for i in range(NEIGHBOURS + 1)]
    size = 4 * numbers * len(masks)
    rows = []
    for cipher in CIPHERS:
        for threads in (1, 2):
            alone, added = best(
                REPEATS,
                lambda c=cipher, t=threads: streamed(c, size, t),
                lambda c=cipher, t=threads: masked(vector, masks, c, t),
            )
            rows.append(
                {
                    "cipher": cipher,
                    "threads": threads,
                    "numbers": numbers,
                    "masks": len(masks),
                    "seconds": added,
                    "GB/s": size / added / 1e9,
                    "GB/s, the cipher alone": size / alone / 1e9,
                    "share of the cipher's rate": alone / added,
                }
            )
    return rows


def flwr_masked(seeds: Sequence[bytes], numbers: int) -> None:
    """As its client does: an int64 mask for each seed, then all modulo 2^32."""
    vector = [np.zeros(numbers, np.int64)]
    for i, seed in enumerate(seeds):
        mask = pseudo_rand_gen(seed, RANGE, [(numbers,)])
        vector = parameters_subtraction(vector, mask) if i % 2 else parameters_addition(vector, mask)
    parameters_mod(vector, RANGE)


def flwr(numbers: int, groups: Sequence[tuple[int, int]]) -> list[Row]:
    """flwr's primitives and ours in turns. groups: threshold and holders of the shares."""
    private, public = generate_key_pairs()
    key = private_key_to_bytes(private)
    rows = []

    def add(work: str, repeats: int, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        mine, other = best(repeats, ours, theirs)
        rows.append({"work": work, "seconds": mine, "flwr, seconds": other, "ratio": other / mine})
        print(rows[-1], flush=True)

    vector = np.zeros(numbers, np.uint32)
    masks = [Mask(os.urandom(32), (-1) ** i) for i in range(NEIGHBOURS + 1)]
    seeds = [generate_shared_key(private, public)] * len(masks)
    for count in (1, len(masks)):
        add(
            f"{count} mask{'s'[: count - 1]} of {numbers:,} numbers",
            3,
            lambda n=count: add_masks(vector, masks[:n]),
            lambda n=count: flwr_masked(seeds[:n], numbers),
        )
    for threshold, holders in groups:
        points = range(1, holders + 1)
        seed = os.urandom(32)
        add(
            f"shares of a client's two secrets, {threshold} of {holders}",
            1,
            lambda t=threshold, p=points, s=seed: [split(s, t, p, os.urandom) for _ in range(2)],
            lambda t=threshold, n=holders, s=seed: [create_shares(x, t, n) for x in (s, key)],
        )
        ours = list(zip(points, split(seed, threshold, points, os.urandom), strict=True))[-threshold:]
        for what, secret in (("seed", seed), ("mask key", key)):
            theirs = create_shares(secret, threshold, holders)[-threshold:]
            _at_zero.cache_clear()
            add(
                f"one {what} from its shares, {threshold} of {holders}",
                1,
                lambda t=threshold, s=ours: combine(s, t),
                lambda s=theirs: combine_shares(s),
            )
    return rows


def main() -> None:
    names = [x for x in sys.argv[1:] if x != "--try"]
    small = "--try" in sys.argv
    part = 0.01 if small else 1.0
    rows = []
    for name in (x for x in CASES if (x in names if names else not small or CASES[x].clients <= 20)):
        command = [sys.executable, str(HERE / "sessions.py"), name, str(part)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    more = {}
    if not names or "limit" in names:
        more["limit"] = limit(int(NUMBERS * part))
        print(*more["limit"], sep="\n", flush=True)
    if not names or "flwr" in names:
        more["flwr"] = flwr(int(1_000_000 * part), [(3, 5)] if small else [(14, 20), (67, 100)])
    if not names and not small:
        save("secagg", rows, more)


if __name__ == "__main__":
    main()
