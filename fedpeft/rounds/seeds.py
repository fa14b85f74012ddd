"""Seeds for every random choice, from the run's one seed."""

from hashlib import sha256

_PURPOSES = (
    "select",
    "train",
    "split",
    "start",
    "partition",
    "baseline",
    "device",
    "evaluate",
    "rank",
    "order",
    "hostile",
    "personal",
    "lost",
    "code",
    "runtime",
)


def derive(seed: int, purpose: str, *path: int) -> int:
    """A seed of 63 bits for one purpose at one place (say a round and a client), independent of all others.

    purpose: one of "select", "train", "split", "start", "partition", "baseline", "device", "evaluate", "rank", "order",
    "hostile", "personal", "lost", "code", "runtime".
    It is the start of SHA-256 over "seed/purpose/path", so it stays the same from version to version.
    (numpy's SeedSequence takes [1, 2] and [1, 2, 0] for one seed, and 2**32 for [0, 1].)
    """
    if purpose not in _PURPOSES:
        raise ValueError(f"purpose: got {purpose!r}; want one of {', '.join(_PURPOSES)}")
    text = "/".join([str(int(seed)), purpose, *(str(int(x)) for x in path)])
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1
