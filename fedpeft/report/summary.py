"""What a history amounts to: the numbers at the head of a report and in a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft.report.history import History
from fedpeft.report.plots import BASELINES, last_clients
from fedpeft.report.records import Score


@dataclass(frozen=True, slots=True)
class Standing:
    """How well one way of training does. mean: of the clients' accuracies on their own test sets, each counting the
    same; worst: the mean of the lowest tenth of them (at least one client).
    """

    name: str
    label: str
    central: Score
    mean: float | None
    worst: float | None


def standings(h: History) -> list[Standing]:
    """The baselines that were measured and this run, in the order base, local, federated, tuned, centralised."""
    found = []
    for name, label, _ in BASELINES:
        if name == "central-training":
            found.append(standing("federated", "federated (this run)", last_central(h), last_clients(h)))
            found += tuned(h)
        if name in h.baselines:
            x = h.baselines[name]
            found.append(standing(name, label, x.central, x.clients))
    return found


def standing(name: str, label: str, central: Score | None, clients: Mapping[int, Score]) -> Standing:
    """The standing of one way of training, from its central score and its clients' scores."""
    values = np.sort([x.accuracy for x in clients.values() if x.accuracy is not None])
    if not len(values):
        return Standing(name, label, central or Score(), None, None)
    tenth = values[: -(-len(values) // 10)]
    return Standing(name, label, central or Score(), float(values.mean()), float(tenth.mean()))


def tuned(h: History) -> list[Standing]:
    """How well the clients do once each has trained for itself after the run; empty where none has."""
    if h.final is None or h.final.tuned is None:
        return []
    label = "with a personal adapter" if setting(h, "personal.dual") == "True" else "tuned by each client"
    return [standing("tuned", f"federated, {label}", None, h.final.tuned.clients)]


def gains(h: History) -> str:
    """What the clients gained by training for themselves after the run, in a sentence; "" where none has."""
    if h.final is None or h.final.tuned is None or h.final.test is None:
        return ""
    before, after = h.final.test.clients, h.final.tuned.clients
    each = [
        100 * (x.accuracy - y.accuracy)
        for n, x in after.items()
        if x.accuracy is not None and (y := before.get(n)) is not None and y.accuracy is not None
    ]
    if not each:
        return ""
    better, worse = sum(x > 0 for x in each), sum(x < 0 for x in each)
    epochs = "1 epoch" if setting(h, "personal.finetune") == "1" else f"{setting(h, 'personal.finetune')} epochs"
    return (
        f"Training for themselves after the run ({epochs}, which nobody else sees), "
        f"{better:,} of {len(each):,} clients do better on their own test sets and {worse:,} worse; mean gain "
        f"{float(np.mean(each)):+.1f} points, smallest {min(each):+.1f}.".replace("-", "−")
    )


def last_central(h: History) -> Score | None:
    """The score on the central test set at the end, or the last that was measured."""
    if h.final is not None and h.final.central is not None:
        return h.final.central
    return next((x.central for x in reversed(h.rounds) if x.central is not None), None)


def setting(h: History, key: str) -> str:
    """The setting at a dotted key as text; "" if it is not there."""
    value: object = h.run.settings
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ""
        value = value[part]
    return "" if value is None else str(value)


def perplexity(score: Score) -> float | None:
    """e to the loss per token; None where there is no loss or it is beyond reading."""
    return None if score.loss is None or score.loss > 50 else float(np.exp(score.loss))
