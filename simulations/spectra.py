"""What real changes of adapters look like, and what rules make of them.

    python simulations/spectra.py errors     the spectrum of each round's mean change, and how near `subspace` comes
    python simulations/spectra.py collapse   the energy above the smallest client's rank, round by round, by rule

Both train the clients of hetero_rank.toml, and errors those of hetero_rank_debian.toml too; what is found goes to
results/, figures as well. Everything is measured on dense matrices, which MiniLM's layers are small enough for.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import numpy as np

from fedpeft.adapters import Adapter, Array, Update
from fedpeft.config import Experiment, read
from fedpeft.rounds import Done, Job, ListRound, Metrics, Round, SumRound, contribute, derive
from fedpeft.rules import FactorMean, FlexLoRA, ListRule, MeanRule, ServerState, Subspace, Task, ZeroPad
from fedpeft.run.workshop import workshop

HERE = Path(__file__).parent
LR = 6e-3
ROUNDS = 20
SMALLEST = 2
COLLAPSE: Mapping[str, MeanRule | ListRule] = {
    "zeropad: the rest dropped, zeros averaged": ZeroPad(),
    "flexlora, full: the rest dropped": FlexLoRA("full"),
    "flexlora, drift: the rest frozen": FlexLoRA(),
    "subspace: the rest frozen": Subspace(seed=1),
    "fedit: the rest frozen": FactorMean(),
}

Clients = Mapping[int, tuple[Update, float]]


def federation(found: Experiment, rule: MeanRule | ListRule, rounds: int) -> Iterator[tuple[ServerState, Clients]]:
    """The state before each round and what its clients did; after the last, the state that it came to."""
    here = workshop(found.settings_json)
    start = here.trainer.start()
    state = ServerState(Task(start.spec), start)
    clients = here.federation.clients
    for number in range(rounds):
        cohort = found.selection.choose(range(clients), found.seed, number, clients, ())
        ranks = {c: found.ranks.of(c, clients, found.seed, number) for c in cohort}
        jobs = []
        for client, rank in ranks.items():
            sent = rule.send(state, rank)
            seed = derive(found.seed, "train", number, client)
            jobs.append(Job(client, number, seed, sent.adapter, rule.trains(sent.task), sent.tail))
        done: dict[int, tuple[Update, float]] = {}
        for job, result in zip(jobs, here.trainer.train_many(jobs), strict=True):
            assert isinstance(result, Done), result
            done[job.client] = Update(job.start, result.trained), float(here.federation.size(job.client)[0])
        yield state, done
        state = after(rule, state, done, ranks)
    yield state, {}


def after(rule: MeanRule | ListRule, state: ServerState, done: Clients, ranks: Mapping[int, int]) -> ServerState:
    """The state that a rule makes of a round."""
    machine: Round
    if isinstance(rule, ListRule):
        machine = ListRound(state, ranks, 1, rule=rule)
    else:
        machine = SumRound(state, ranks, 1, rule=rule)
    while not machine.is_over:
        for client, sent in machine.outbox().items():
            update, weight = done[client]
            answer = contribute(rule, machine.channel, update, weight, Metrics(), sent.task)
            machine.receive(client, answer, sent.task.round, sent.task.pass_)
        machine.close()
    return machine.result().state


def whole(state: ServerState) -> dict[str, Array]:
    """ΔW of each layer, the tail included, in fp64."""
    return {n: x + (state.tail[n].product() if n in state.tail else 0) for n, x in products(state.adapter).items()}


def products(adapter: Adapter) -> dict[str, Array]:
    return {n: x.scale * x.b.astype(float) @ x.a.astype(float) for n, x in adapter.layers.items()}


def mean_change(done: Clients) -> dict[str, Array]:
    """The weighted mean of the clients' changes of ΔW."""
    total = sum(weight for _, weight in done.values())
    out: dict[str, Array] = {}
    for update, weight in done.values():
        new, old = products(update.trained), products(update.received)
        for n, x in new.items():
            out[n] = out.get(n, 0) + weight / total * (x - old[n])
    return out


def relative(errors: Sequence[Array], changes: Sequence[Array]) -> float:
    """Over all layers: the root of the summed squares of the errors, relative to the changes'."""
    return float(np.sqrt(sum(np.sum(x**2) for x in errors) / sum(np.sum(x**2) for x in changes)))


def errors(task: str, file: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A row a round: where the energy of the mean change is, and the error of each form of `subspace`."""
    found = read(HERE / file, [f"training.lr={LR}"])
    forms = {
        "warm": Subspace(seed=1),
        "cold": Subspace(seed=1, warm=False),
        "one pass": Subspace(seed=1, one_pass=True),
    }
    clients = found.settings["partition"]["clients"]
    for state, done in federation(found, forms["warm"], rounds):
        if not done:
            return
        change, before = mean_change(done), whole(state)
        names = list(change)
        values = {n: np.linalg.svd(change[n], compute_uv=False) ** 2 for n in names}
        target = {n: before[n] + change[n] for n in names}
        rank = state.task.spec.layers[0].rank
        row: dict[str, Any] = {"task": task, "round": state.task.round + 1}
        for kept in (2, 8, rank):
            row[f"energy in the first {kept}"] = sum(v[:kept].sum() for v in values.values()) / sum(
                v.sum() for v in values.values()
            )
        shares = [np.cumsum(v) / v.sum() for v in values.values()]
        row["directions for 99 %"] = float(np.median([np.searchsorted(s, 0.99) + 1 for s in shares]))
        best = [target[n] - cut(target[n], rank) for n in names]
        row[f"error of the best of rank {rank}"] = relative(best, list(change.values()))
        ranks = {c: found.ranks.of(c, clients, found.seed, state.task.round) for c in done}
        for form, rule in forms.items():
            got = whole(after(rule, replace(state), done, ranks))
            row[form] = relative([target[n] - got[n] for n in names], list(change.values()))
        row["spectrum"] = [float(np.median([v[i] / v[0] for v in values.values()])) for i in range(96)]
        yield row


def cut(x: Array, rank: int) -> Array:
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vt[:rank])


def collapse(name: str) -> Iterator[dict[str, Any]]:
    """A row a round: the energy of the server's ΔW beyond its first directions, as many as the smallest rank."""
    found = read(HERE / "hetero_rank.toml", [f"training.lr={LR}"])
    for state, _ in federation(found, COLLAPSE[name], ROUNDS):
        values = [np.linalg.svd(x, compute_uv=False) ** 2 for x in whole(state).values()]
        total = sum(v.sum() for v in values)
        above = sum(v[SMALLEST:].sum() for v in values)
        yield {
            "rule": name,
            "round": state.task.round,
            "energy above": float(above / total) if total else None,
            "norm": float(np.sqrt(total)),
        }


def main(what: str) -> None:
    rows: list[dict[str, Any]] = []
    if what == "errors":
        for task, file in (("wiki11", "hetero_rank.toml"), ("debian", "hetero_rank_debian.toml")):
            for row in errors(task, file, 6):
                rows.append(row)
                print({k: v for k, v in row.items() if k != "spectrum"}, flush=True)
        draw_errors(rows)
    else:
        for name in COLLAPSE:
            for row in collapse(name):
                rows.append(row)
                print(row, flush=True)
        draw_collapse(rows)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{what}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")


def draw_errors(rows: Sequence[Mapping[str, Any]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for task, colour in (("wiki11", "C0"), ("debian", "C1")):
        mine = [r for r in rows if r["task"] == task]
        axes[0].semilogy(range(1, 97), np.sqrt(mine[-1]["spectrum"]), color=colour, label=task)
        best = next(k for k in mine[0] if k.startswith("error of the best"))
        for key, style in ((best, "-"), ("warm", "--"), ("cold", ":"), ("one pass", "-.")):
            label = f"{task}: {'best' if key == best else key}"
            axes[1].plot([r["round"] for r in mine], [r[key] for r in mine], style, color=colour, label=label)
    axes[0].set(
        xlabel="direction", ylabel="singular value, relative", title="mean change of the last round, median layer"
    )
    axes[1].set(xlabel="round", ylabel="relative error", title="what is lost of the mean change", ylim=(0, None))
    for ax in axes:
        ax.legend(fontsize=7)
    save(figure, "errors")


def draw_collapse(rows: Sequence[Mapping[str, Any]]) -> None:
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name in COLLAPSE:
        mine = [r for r in rows if r["rule"] == name and r["energy above"] is not None]
        ax.semilogy([r["round"] for r in mine], [r["energy above"] for r in mine], label=name)
    ax.set(xlabel="round", ylabel=f"share of the energy above rank {SMALLEST}")
    ax.legend(fontsize=7)
    save(figure, "collapse")


def save(figure: Any, name: str) -> None:
    (HERE / "results").mkdir(exist_ok=True)
    figure.savefig(HERE / "results" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "errors")
