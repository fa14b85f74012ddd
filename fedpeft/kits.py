"""The command that makes what devices without torch train from: `fedpeft export-step`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedpeft.terminal import size


class Held(StrEnum):
    """What the frozen matrices of a kit are held in."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"
    int4 = "int4"


def export_step(
    experiment: Annotated[Path, typer.Argument(help="The experiment, a TOML file.")],
    out: Annotated[Path, typer.Option(help="The kit's folder; what is in it of an earlier kit is replaced.")],
    quantise: Annotated[
        Held | None, typer.Option(help="What the base is held in; as model.quantise says if not given.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, and a third more time: activations are computed again.")
    ] = False,
    change: Annotated[
        list[str],
        typer.Option("-c", metavar="KEY=VALUE", help="Change one key, such as adapter.rank=4; may be repeated."),
    ] = [],  # noqa: B006  # typer reads it, nobody writes it
) -> None:
    """Make a kit: the folder that devices train this experiment from without torch, in a few hundred megabytes.

    It has the frozen base once, in a file that is mapped into memory (base.safetensors); a step's losses and gradients
    as a graph that stock onnxruntime runs (step.onnx), and the losses alone (evaluate.onnx), for any batch, length and
    rank; the adapter before training; and the tokenizer. Text only: classification and language models.

    **int8** takes a quarter of fp32's memory, nf4 and int4 an eighth; adapters and their gradients stay in fp32. An
    experiment whose clients differ names all of their formats in model.formats.

    The graph is run beside torch before the command says done, and losses and gradients must be the same to 1e-4.
    The first export of an experiment takes seconds to minutes; further ones are copies. On a device:
    `pip install 'fedpeft[onnx]'` and a node config with runtime="onnx" kit="FOLDER"; or leave kit out, and the
    coordinator sends it. With torch and little memory, model.name = "FOLDER" loads the same base.
    """
    from fedpeft import config
    from fedpeft.run.kits import export_kit

    console = Console()
    changes = [*change, "training.checkpointing=true"] if recompute else list(change)
    with console.status("loading the model") as status:
        kit, done = export_kit(
            config.read(experiment, changes),
            out,
            None if quantise is None else quantise.value,
            lambda what: status.update(what),
        )
    facts = kit.facts
    table = Table(show_header=False, box=None)
    for what, value in (
        ("kit", f"{out}, of {facts.model} for {facts.method} ({done})"),
        ("base", f"{facts.quantise}, {size(kit.files['base.safetensors'][1])}"),
        ("in all", f"{size(sum(bytes for _, bytes in kit.files.values()))} in {len(kit.files) + 1} files"),
        ("rank", f"{max((x.rank for x in facts.spec.layers), default=0)}; a client may have any other"),
        ("rows", f"at most {facts.longest:,} tokens"),
        (
            "checked",
            f"losses {facts.checked['loss']:.1e} off torch's, gradients' cosine 1 − {facts.checked['gradient']:.1e}",
        ),
        ("digest", kit.digest),
    ):
        table.add_row(f"[bold]{what}[/]", value)
    console.print(table, highlight=False)
