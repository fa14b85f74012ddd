"""The command that says what fits a device: `fedpeft plan`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpeft.terminal import size

PARTS = ("base", "adapter", "activ.", "work")


class Data(StrEnum):
    """What `fedpeft plan` is for."""

    lm = "lm"
    classify = "classify"


class Runtime(StrEnum):
    """What may run on the device."""

    torch = "torch"
    onnx = "onnx"
    any = "any"


def plan(
    budget: Annotated[str, typer.Option(help="Memory that training may take, such as 512MB.")],
    model: Annotated[str, typer.Option(help="A model, where there is no experiment.")] = "smollm2",
    data: Annotated[Data | None, typer.Option(help="What is trained; what the model is for if not given.")] = None,
    experiment: Annotated[Path | None, typer.Option(help="An experiment whose settings are to fit.")] = None,
    change: Annotated[list[str], typer.Option("-c", metavar="KEY=VALUE", help="Change one of its keys.")] = [],  # noqa: B006
    link: Annotated[str | None, typer.Option(help="The device's link, such as 1Mbit/s.")] = None,
    round: Annotated[str | None, typer.Option(help="How long a round may take, such as 10min.")] = None,
    runtime: Annotated[Runtime, typer.Option(help="What may run on the device.")] = Runtime.any,
) -> None:
    """What fits a device: memory at the peak of training, and bytes of a round, foretold for all sensible settings.

    With --experiment its own settings are judged: where they don't fit, the error says the cheapest change that does.
    Least harm comes first: fewer rows at a time, then recomputing activations, an int8 base, another runtime, a 4-bit
    base, shorter texts, one factor frozen, fewer layers, a lower rank.
    """
    from fedpeft import config
    from fedpeft.run import plan as plans
    from fedpeft.run.needs import CARRIER
    from fedpeft.training.plan import ENGINES, told
    from fedpeft.training.settings import Method, Model, Training

    holds, rate = plans.budget_of(budget), plans.link_of(link, round)
    engines = tuple(x for x in ENGINES if runtime.value in (x, "any"))
    if experiment is not None:
        wanted = plans.wish_of(config.read(experiment, change), engines)
        found = wanted.check(holds, rate)
    else:
        is_dialogue = plans.is_dialogue(model) if data is None else data is Data.lm
        wanted = plans.wish(Model(model), Method(), Training(), is_dialogue, engines=engines)
        found = wanted.plan(holds, rate)
    console, fits = Console(), (found.best, *found.others)
    table = Table(
        "", *("runs on", "base", "MB"), "[dim]runtime[/]", *(f"[dim]{x}[/]" for x in PARTS), "up", "down", box=None
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for number, fit in enumerate(fits, 1):
        p = fit.parts
        parts = (p.runtime, p.base, p.adapter, p.activations + p.kept, p.work)
        each = (f"[dim]{x / 1e6:.0f}[/]" for x in parts)
        base = "fp32" if fit.choice.quantise == "none" else fit.choice.quantise
        total = f"{fit.parts.total / 1e6:.0f}"
        table.add_row(f"{number}", fit.choice.engine, base, total, *each, size(fit.up), size(fit.down))
    console.print(table, highlight=False)
    carried = " or ".join(f"{CARRIER[x] / 1e6:.0f} MB ({x})" for x in engines)
    console.print(
        "MB at the peak, by part in grey; up and down a client and round\n"
        f"on a deployed node Flower's client and its rows take {carried} more, of the node's `memory` too\n",
        style="dim",
        highlight=False,
    )
    for number, fit in enumerate(fits, 1):
        changes = told(fit.choice, wanted.choice) or "as it is"
        console.print(f"{number}: {changes}", highlight=False, markup=False, soft_wrap=True)
    text = plans.lines(found.best.choice, wanted.choice)
    if text:
        console.print(f"\nfor the first of these, in the experiment:\n\n{text}", highlight=False, markup=False)
