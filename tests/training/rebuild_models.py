"""A fresh process that rebuilds models from (settings, adapter): `python -m tests.training.rebuild_models FOLDER`.

FOLDER/NAME.pickle holds the adapter of the case of that name; FOLDER/logits.npz is what this writes.
"""

import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from tests.training.peft_cases import CASES, attach, logits


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    said = {}
    for case in CASES:
        file = folder / f"{case.name}.pickle"
        if file.exists():
            # Another seed: what is drawn at random here must all come from the adapter.
            bridge = attach(case, seed=2)
            bridge.write(pickle.loads(file.read_bytes()))
            said[case.name] = logits(bridge.model, case.model).numpy()
    np.savez(folder / "logits.npz", **said)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
