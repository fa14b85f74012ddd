"""Seeds for every random choice, from the run's one seed."""

import numpy as np

_PURPOSES = ("select", "train", "split", "start", "partition", "baseline")


def derive(seed: int, purpose: str, *path: int) -> int:
    """A seed of 63 bits for one purpose at one place (say a round and a client), independent of all others.

    purpose: one of "select", "train", "split", "start", "partition", "baseline".
    """
    words = np.random.SeedSequence([seed, _PURPOSES.index(purpose), *path]).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1
