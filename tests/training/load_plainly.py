"""What a user does who has never heard of this project: `python load_plainly.py FOLDER`, with stock libraries only.

FOLDER/adapters.json lists name, model (what loads it, its folder, its number of labels) and the adapter's
folder; FOLDER/MODEL.npz holds each model's inputs, FOLDER/logits.npz is what this writes.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import PeftModel


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    said = {}
    for one in json.loads((folder / "adapters.json").read_text()):
        with np.load(folder / f"{one['model']}.npz") as kept:
            inputs = {n: torch.from_numpy(kept[n]) for n in kept}
        labels = {} if one["labels"] is None else {"num_labels": one["labels"]}
        kind = getattr(transformers, one["class"])
        base = kind.from_pretrained(folder / one["model"], **labels)
        said[one["name"]] = run(PeftModel.from_pretrained(base, folder / one["adapter"]), inputs)
        if one["readme"]:
            said[one["name"] + "/readme"] = run(follow(folder / one["adapter"]), inputs)
    assert not [x for x in sys.modules if x.split(".")[0] == "fedpeft"]
    np.savez(folder / "logits.npz", **said)


def follow(adapter: Path) -> torch.nn.Module:
    """The model that the code in the adapter's README makes."""
    os.chdir(adapter)
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, torch.nn.Module] = {}
    exec(code, names)
    return names["model"]


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> "np.ndarray":
    with torch.no_grad():
        return model.eval()(**inputs).logits.numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
