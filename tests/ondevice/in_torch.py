"""The hand-made kit's model again, in torch, and its training as ``fit`` has it: with torch's own optimisers."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedpeft.adapters import LowRank, bases
from fedpeft.data import Encoded, Padded, padded
from fedpeft.rounds import Job, Metrics
from fedpeft.training.objectives import Extra, Proximal, scored
from fedpeft.training.passes import groups
from fedpeft.training.settings import Training
from tests.ondevice.small_kit import SCALE, frozen

Values = dict[str, Tensor]


def outcome(values: Values, tail: Mapping[str, LowRank], batch: Padded) -> tuple[Tensor, Tensor]:
    """Losses and hits."""
    base = {n: torch.tensor(x) for n, x in frozen().items()}
    x = base["embed"][torch.tensor(batch.ids)]
    if batch.where is None:
        mask = torch.tensor(batch.mask)[..., None].float()
        x = (x * mask).sum(1) / mask.sum(1)
    else:
        x = x[torch.tensor(batch.where)]
    for n in ("q", "v"):
        y = x @ base[f"{n}.weight"].T + SCALE * x @ values[f"{n}/a"].T @ values[f"{n}/b"].T
        if n in tail:
            a, b = (torch.tensor(z, dtype=torch.float32) for z in (tail[n].a, tail[n].b))
            y = y + tail[n].scale * x @ a.T @ b.T
        x = y
    return scored(x @ values["head"].T + values["bias"], torch.tensor(batch.targets))


def train(job: Job, rows: Encoded, training: Training) -> tuple[Values, Metrics]:
    """What the adapter's tensors become, and the sums."""
    values: Values = {n: torch.tensor(x) for n, x in job.start.tensors().items()}
    chosen = {n: torch.nn.Parameter(values[n]) for n in job.start.tensors("ab" if len(job.trains) > 2 else job.trains)}
    found = bases(job.start) if len(job.trains) > 2 else {}
    for n, x in found.items():
        del chosen[f"{n}/a"], chosen[f"{n}/b"]
        cores = torch.tensor(x.cores(job.start.layers[n].b), dtype=torch.float32)
        chosen[f"{n}/core"] = torch.nn.Parameter(cores)
        if job.trains == "heads":
            chosen[f"{n}/scale"] = torch.nn.Parameter(torch.ones(len(cores)))

    def now() -> Values:
        mine = values | {n: x for n, x in chosen.items() if n in values}
        for n, x in found.items():
            core = chosen[f"{n}/core"]
            if job.trains == "heads":
                core = core * chosen[f"{n}/scale"][:, None, None]
            mine[f"{n}/b"] = torch.cat(list(torch.tensor(x.lefts, dtype=torch.float32) @ core), dim=1)
        return mine

    start = [x.detach().clone() for x in chosen.values()]
    extra = Extra.of(job.objective, chosen, {n: x for n, x in job.objective.shift.items() if n in chosen})
    kind = torch.optim.SGD if training.optimiser == "sgd" else torch.optim.AdamW
    further = {"momentum": training.momentum} if training.optimiser == "sgd" else {}
    optimiser = kind(chosen.values(), lr=training.lr, weight_decay=training.weight_decay, **further)
    done = Metrics(examples=len(rows))
    for group in groups(rows, training, np.random.default_rng(job.seed)):
        batches = [padded(rows.store, rows.index[x], 0, rows.store.targets.max() > 2) for x in group]
        optimiser.zero_grad()
        units = sum(len(x.targets) for x in batches)
        for batch in batches:
            each, hits = outcome(now(), job.tail, batch)
            (each.sum() / units).backward()
            done += Metrics(each.sum().item(), len(each), int(hits.sum()))
        if training.prox:
            Proximal(training.prox)(chosen.values(), start).backward()
        extra.penalise()
        if training.clip is not None:
            torch.nn.utils.clip_grad_norm_(chosen.values(), training.clip)
        extra.shift()
        optimiser.step()
    return {n: x.detach() for n, x in now().items()}, done
