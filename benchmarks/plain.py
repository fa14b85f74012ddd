"""Federated clients one after another as a user would write it with torch, transformers and peft, and nothing else.

This file imports nothing of this project, so that its process has no settings but the libraries' own.
Run by throughput.py: python plain.py FOLDER, and then a line of input for each run.
"""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

Row = tuple[list[int], int]


def load(work: Mapping[str, Any]) -> PeftModel:
    """The base model with LoRA on it, as its documentation says."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # transformers' own
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own
    if work["task"] == "lm":
        base = AutoModelForCausalLM.from_pretrained(work["folder"], dtype=torch.float32)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(
            work["folder"],
            dtype=torch.float32,
            num_labels=work["classes"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    config = LoraConfig(
        task_type="CAUSAL_LM" if work["task"] == "lm" else "SEQ_CLS",
        r=work["rank"],
        lora_alpha=work["alpha"],
        target_modules=list(work["targets"]),
    )
    return get_peft_model(base, config)


def collated(rows: Sequence[Row], work: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch, padded to its longest row; for a language model the labels of prompts and pads are -100."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [work["pad"]] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    if work["task"] != "lm":
        labels = torch.tensor([label for _, label in rows])
    else:
        place = torch.arange(longest)
        prompt = torch.tensor([before for _, before in rows])[:, None]
        labels = torch.where((place >= prompt) & (mask == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fit(
    model: PeftModel,
    start: Mapping[str, Tensor],
    mine: Mapping[str, Any],
    work: Mapping[str, Any],
    in_plan: bool,
) -> tuple[dict[str, Tensor], float, int]:
    """One epoch on a client's rows from the given start: its state, the sum of its losses, and padded tokens.

    in_plan: in the order that is written down, else in a random one.
    """
    set_peft_model_state_dict(model, dict(start))
    rows = list(zip(mine["ids"], mine["targets"], strict=True))
    order: dict[str, Any] = {"batch_sampler": mine["plan"]}
    if not in_plan:
        order = {"batch_size": work["batch"], "shuffle": True}
    loader: DataLoader[Any] = DataLoader(rows, collate_fn=lambda x: collated(x, work), **order)  # type: ignore[arg-type]
    chosen = [x for x in model.parameters() if x.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=work["lr"], weight_decay=0.0)
    total, tokens = 0.0, 0
    model.train()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, work["clip"])
        optimiser.step()
        optimiser.zero_grad()
        labels = batch["labels"]
        units = len(labels) if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())
        total += loss.item() * units
        tokens += batch["input_ids"].numel()
    return {name: x.clone() for name, x in get_peft_model_state_dict(model).items()}, total, tokens


def main() -> None:
    """One line of output for each line of input, "plan" or "random", and how many clients."""
    folder = Path(sys.argv[1])
    work = json.loads((folder / "work.json").read_text(encoding="utf8"))
    start = load_file(folder / "start.safetensors")
    model = load(work)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began, spent = perf_counter(), process_time()
        order, clients = line.split()
        each = [fit(model, start, mine, work, order == "plan") for mine in work["clients"][: int(clients)]]
        answer = {
            "seconds": perf_counter() - began,
            "cpu seconds": process_time() - spent,
            "losses": [total for _, total, _ in each],
            "padded tokens": sum(tokens for *_, tokens in each),
            "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 * 1.048576,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
