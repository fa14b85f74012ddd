"""The command line."""

import os
import sys
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import tomli_w
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpeft import __version__
from fedpeft.errors import ConfigError, DataError, ProtocolError
from fedpeft.keys import helper, keys
from fedpeft.kits import export_step
from fedpeft.plans import plan
from fedpeft.terminal import Terminal, headline, size, words
from fedpeft.training.environment import prepare, starting

app = typer.Typer(
    help="Fine-tune transformer models across clients that keep their data: only adapter changes travel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(keys, name="keys")
console = Console()

Change = Annotated[
    list[str],
    typer.Option("-c", metavar="KEY=VALUE", help="Change one key, such as training.lr=0.01; may be repeated."),
]
_WIDE = 140  # columns of a terminal that has room for what each rule does
_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt: 128 and the signal's number
Force = Annotated[bool, typer.Option("--force", help="Start over in a folder that holds an earlier run.")]


class Format(StrEnum):
    """What `fedpeft export` writes."""

    peft = "peft"
    merged = "merged"
    onnx = "onnx"
    gguf = "gguf"


def main() -> None:
    """The entry point: a user's mistake is one message on stderr and exit code 2, never a traceback."""
    prepare()
    try:
        app()
    except (ConfigError, DataError, ProtocolError) as error:
        Console(stderr=True).print(
            "error:", str(error), style="bold red", highlight=False, markup=False, soft_wrap=True
        )
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            Console(stderr=True).print("stopped; `fedpeft resume RUN` goes on from the last checkpoint")
        raise


@app.command()
def demo(
    change: Change = [],  # noqa: B006  # typer reads it, nobody writes it
    folder: Annotated[Path, typer.Option(help="Where the run is kept.")] = Path("runs/demo"),
) -> None:
    """Fine-tune MiniLM on Wikipedia topics across 20 clients, and write a report. Takes a few minutes.

    The experiment is printed first: it is a good one to copy and change.
    """
    source = Path(str(files("fedpeft").joinpath("demo.toml")))
    console.print(source.read_text(encoding="utf8"), style="dim", highlight=False, markup=False)
    _run(source, change, folder, force=True)


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment, a TOML file.")],
    change: Change = [],  # noqa: B006
    folder: Annotated[Path | None, typer.Option(help="Where the run is kept; runs/NAME if not given.")] = None,
    force: Force = False,
) -> None:
    """Simulate the experiment on this machine: one process, one resident base model.

    The run's folder gets report.html, metrics.jsonl, config.lock.toml, checkpoints/ and adapter/.
    """
    _run(experiment, change, folder, force)


@app.command()
def check(
    experiment: Annotated[Path, typer.Argument(help="The experiment, a TOML file.")],
    change: Change = [],  # noqa: B006
) -> None:
    """Say what a run would do, and refuse what cannot run: settings, bytes per client and round, memory."""
    from fedpeft import config
    from fedpeft.run import forecast

    found = config.read(experiment, change)
    console.print(tomli_w.dumps(found.settings), highlight=False, markup=False)
    ahead = forecast(found)
    share = ahead.parameters / ahead.base_parameters
    table = Table(show_header=False, box=None)
    for what, value in (
        ("clients", f"{ahead.clients:,}, {ahead.cohort:,} in each round, {ahead.least} answers at least"),
        (
            "rows",
            f"{ahead.rows:,} to train on; {ahead.smallest} to {ahead.largest} a client"
            if ahead.rows
            else "each node's own",
        ),
        (
            "trained numbers",
            f"{ahead.parameters:,} of {ahead.base_parameters:,} ({share:.2%})",
        ),
        ("up", f"{'at most ' if ahead.ranks else ''}{size(ahead.bytes_up)} a client and round"),
        ("down", f"{size(ahead.bytes_down)} a client and round, and {size(ahead.bytes_once)} once"),
        ("memory", f"about {size(ahead.memory)} at the peak, of this machine's {size(ahead.available)}"),
        ("in one step", f"{ahead.together} of a round's clients" if ahead.together > 1 else "one client"),
    ):
        table.add_row(f"[bold]{what}[/]", value)
    if ahead.ranks:
        told = ", ".join(f"{rank} × {count}" for rank, count in ahead.ranks)
        of = f" of {ahead.told} clients" if ahead.told < ahead.clients else " clients"
        table.add_row("[bold]ranks[/]", f"{told}{of}")
    if ahead.runtimes:
        told = ", ".join(f"{name} × {count}" for name, count in ahead.runtimes)
        table.add_row("[bold]runtimes[/]", f"{told}; the base is in memory once for each")
    if ahead.refusal:
        table.add_row("[bold]because[/]", f"{found.adapter.method} can't be trained for many at once: {ahead.refusal}")
    for what, value in [*ahead.secrecy, *(ahead.outlook.lines() if ahead.outlook is not None else ())]:
        table.add_row(f"[bold]{what}[/]", value)
    console.print(table, highlight=False)


@app.command()
def rules(
    what: Annotated[
        str | None, typer.Argument(help="An experiment, for bytes of its model; or a rule's name, for all on it.")
    ] = None,
    change: Change = [],  # noqa: B006
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown, with the papers.")] = False,
) -> None:
    """What rule.name may be: what each rule sends, whether it is exact, what the server sees; other packages' too.

    Each fact is found out by trying the rule on small random clients, with its default settings.
    """
    from fedpeft import config
    from fedpeft.run import rulebook as book

    if what is not None and not what.endswith(".toml") and not Path(what).is_file():
        console.print(book.page(what), highlight=False, markup=False)
        return
    rows = book.rulebook(None if what is None else config.read(Path(what), change))
    if markdown:
        typer.echo(book.markdown(rows), nl=False)
        return
    shown = [i for i, head in enumerate(book.HEADS) if head != book.ABOUT or console.width >= _WIDE]
    table = Table(*(book.HEADS[i] for i in shown), box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(escape(row.cells()[i]) for i in shown))
    console.print(table, highlight=False)
    first = book.LEGEND[0] if what is None else book.BYTES
    legend = [first, *book.LEGEND[1:]]
    if len(shown) < len(book.HEADS):
        legend.append("What one does: `fedpeft rules NAME`.")
    console.print("\n".join(legend), style="dim", highlight=False, markup=False)


@app.command()
def resume(folder: Annotated[Path, typer.Argument(help="The folder of a run that was cut off.")]) -> None:
    """Go on from the last checkpoint: the result is the same, bit for bit, as without the break."""
    from fedpeft.run import simulate, stored

    with Terminal(console) as view:
        _finish(simulate(stored(folder), folder, view))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("comparison"),
) -> None:
    """Runs side by side: a table here, figures in a page. Runs that differ in nothing but the seed are pooled."""
    from fedpeft.report import arrival_table, table, write_comparison
    from fedpeft.report import compare as side_by_side

    found = side_by_side(runs)
    _whole(table(found))
    if (arrivals := arrival_table(found)) is not None:
        _whole(arrivals)
    console.print(f"figures: {write_comparison(found, out)}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep, a TOML file beside its base experiment.")],
    folder: Annotated[Path | None, typer.Option(help="Where the runs are kept; runs/NAME if not given.")] = None,
    large: Annotated[bool, typer.Option("--large", help="Apply the sweep's [large] settings.")] = False,
) -> None:
    """Run every case, grid point and seed of a sweep that has not been run yet, and compare them."""
    from fedpeft import config
    from fedpeft import sweep as sweeps

    found = sweeps.read(file)
    where = folder or Path("runs") / (found.name + ("-large" if large else ""))
    with Terminal(console) as view:
        done = sweeps.run_all(found, config.load(file.parent / found.base), where, view, large)
    compare([path for paths in done.values() for path in paths], where / "comparison")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The folder of a run.")],
    to: Annotated[
        Format,
        typer.Option(
            help="peft: the adapter, for peft; merged: the whole model, for transformers; onnx: the whole model, for "
            "onnxruntime; gguf: the adapter, for llama.cpp."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Where it goes; into the run's folder if not given.")] = None,
) -> None:
    """Write what a run has trained for others to load: none of them needs fedpeft.

    **peft**: an adapter folder. Any method; the base stays as it is, so it is small.

    **merged**: a folder that plain transformers loads. Methods whose update is a change of weights; those of a packed
    base are written expanded, as the adapter was trained on them.

    **onnx**: a graph in fp32 for stock onnxruntime, any batch and length, with the tokenizer's files and code that
    runs it. Methods as for merged; needs `pip install 'fedpeft[onnx]'`; takes minutes.

    **gguf**: a LoRA that llama.cpp runs beside the base (`--lora`). LoRA and rsLoRA on language models of the Llama and
    GPT-2 families; for others export to merged, and convert that.

    Each is loaded again first, and its logits compared with the run's: beyond 1e-4 of the largest it is an error, and
    no onnx or gguf file is left. A README beside each, but for merged, says how to load it.
    """
    from fedpeft.run import export_run

    console.print(f"written: {export_run(folder, to.value, out)}")


@app.command()
def doctor(
    assets: Annotated[bool, typer.Option("--assets", help="Only which models and data sets are here.")] = False,
) -> None:
    """What this machine can do: cores, memory, device, measured rates, models and data sets that are here."""
    from fedpeft.data import assets as data_sets
    from fedpeft.training.machine import facts, models

    found = {**models(), **data_sets()} if assets else {**facts(), **models(), **data_sets()}
    table = Table(show_header=False, box=None)
    for what, value in found.items():
        table.add_row(f"[bold]{what}[/]", "\n".join(words(value)))
    console.print(table, highlight=False, soft_wrap=True)


for command in (export_step, helper, plan):
    app.command()(command)


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Fine-tune transformer models across clients that keep their data: only adapter changes travel."""
    if version:
        console.print(__version__)
        raise typer.Exit


def _run(experiment: Path, change: list[str], folder: Path | None, force: bool) -> None:
    with starting():
        from fedpeft import config
        from fedpeft.run import simulate

        found = config.read(experiment, change)
    with Terminal(console) as view:
        _finish(simulate(found, folder or Path("runs") / found.name, view, force=force, fresh=True))


def _finish(folder: Path) -> None:
    console.print(headline(folder))
    console.print(f"report:  {os.path.relpath(folder / 'report.html')}\nadapter: {os.path.relpath(folder / 'adapter')}")


def _whole(table: Table) -> None:
    """Print a table as wide as it is: in a narrow terminal its lines go on in the next, and no cell is cut."""
    table.caption, caption = None, table.caption
    natural = console.measure(table, options=console.options.update(width=10_000)).maximum
    Console(file=console.file, width=max(natural, console.width)).print(table)
    if caption:
        console.print(caption, style="dim", highlight=False)
