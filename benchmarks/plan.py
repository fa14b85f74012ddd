"""Peak memory of a client's training as `fedpeft plan` foretells it, and as the kernel measures it (VmHWM) in a process
of its own, for combinations of model, runtime, format, rank, length, batch and checkpointing.
Run: python benchmarks/plan.py [--try]
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from fedpeft.training.environment import prepare, sparing

if len(sys.argv) > 2:  # a child: before anything is imported that allocates
    prepare(threads=1)
    sparing()

import numpy as np
from status import status

from fedpeft.config import experiment
from fedpeft.data import Federation, Table
from fedpeft.errors import ConfigError
from fedpeft.rounds import Done, Job, derive

STEPS = 2
WORDS = [x + y + z for x in "bcdfglmnprst" for y in "aeiou" for z in ("t", "n", "ll", "king", "r", "st")]


@dataclass(frozen=True, slots=True)
class Case:
    """A client. layers: that are adapted, the top ones, or all; trains: both factors, or FFA's one; kit: the folder
    that an ONNX client trains from."""

    model: str
    quantise: str = "none"
    rank: int = 8
    batch: int = 8
    length: int = 128
    checkpointing: bool = False
    layers: int | None = None
    trains: str = "ab"
    micro: int | None = None
    targets: tuple[str, ...] = ()
    runtime: str = "torch"
    kit: str = ""

    @property
    def is_dialogue(self) -> bool:
        return self.model in ("smollm2", "tiny-llama")


@dataclass(slots=True)
class Kits:
    """Folders that ONNX clients train from, made when first needed: a step's export takes minutes."""

    root: Path
    made: dict[tuple[object, ...], str] = field(default_factory=dict[tuple[object, ...], str])

    def of(self, case: Case) -> str:
        """The kit that a case needs."""
        key = case.model, case.quantise, case.checkpointing, case.trains
        if key not in self.made:
            out = self.root / "-".join(map(str, key))
            call(["export", json.dumps(asdict(case)), str(out)])
            self.made[key] = str(out)
        return self.made[key]


CASES = (
    Case("minilm"),
    Case("minilm", batch=16, length=64, rank=32),
    Case("minilm", batch=16, length=256, checkpointing=True),
    Case("minilm", "int8", batch=16),
    Case("minilm", "nf4", length=256, targets=("all-linear",)),
    Case("minilm", batch=32, micro=4, layers=2),
    Case("smollm2", batch=1),
    Case("smollm2", batch=2, checkpointing=True),
    Case("smollm2", batch=1, length=256, trains="b"),
    Case("smollm2", "int8", batch=1),
    Case("smollm2", "int8", batch=4, checkpointing=True),
    Case("smollm2", "nf4", batch=1, rank=64),
    Case("smollm2", "int4", batch=4, length=64, layers=8),
    Case("minilm", runtime="onnx"),
    Case("minilm", "int8", batch=16, length=64, runtime="onnx"),
    Case("smollm2", "int8", batch=1, runtime="onnx"),
    Case("smollm2", "int8", batch=2, checkpointing=True, runtime="onnx"),
    Case("smollm2", "int4", batch=1, length=64, rank=2, runtime="onnx"),
)
TRIES = (Case("tiny-bert"), Case("tiny-llama", "int8", batch=2, length=32, checkpointing=True))


def settings(case: Case) -> dict[str, object]:
    """The case as an experiment."""
    return {
        "model": {"name": case.model, "quantise": case.quantise},
        "data": {"name": "chitchat" if case.is_dialogue else "wiki11"},
        "evaluation": {"central": False},
        "simulation": {"engine": "loop"},
        "adapter": {"rank": case.rank, "targets": list(case.targets)}
        | ({} if case.layers is None else {"layers": case.layers}),
        "rule": {"name": "fedit" if case.trains == "ab" else "ffa"},
        "training": {
            "batch": case.batch,
            "length": case.length,
            "steps": STEPS,
            "checkpointing": case.checkpointing,
            "device": "cpu",
            "threads": 1,
            "attention": "sdpa",
        }
        | ({} if case.micro is None else {"micro": case.micro}),
    }


def rows(case: Case) -> Federation:
    """One client with one batch of texts of many words, every second of which is shorter, so that there is padding."""
    rng, count = np.random.default_rng(0), np.arange(case.batch)
    sizes = [2 * case.length if i % 2 == 0 else max(4, case.length // 2) for i in count]
    texts = tuple(" ".join(rng.choice(WORDS, size)) for size in sizes)
    none = np.zeros(0, np.int64)
    table = Table("classify", texts, count % 3, ("a", "b", "c"))
    if case.is_dialogue:
        table = Table("lm", ("hello",) * case.batch, texts)
    return Federation(table, ("all",), (count,), (none,), (none,), none)


def child(case: Case) -> dict[str, float]:
    """The case's peak in this process, in MB."""
    found, federation = experiment(settings(case)), rows(case)
    if case.runtime == "onnx":
        from fedpeft.ondevice.trainer import OnnxTrainer
        from fedpeft.training.kit import Kit

        trainer = OnnxTrainer.open(Kit.open(Path(case.kit)), found.training, federation, found.model)
    else:
        from fedpeft.training.loop import TorchTrainer

        trainer = TorchTrainer.load(found.model, found.adapter, found.training, federation, derive(found.seed, "start"))
    loading = status("VmHWM")
    (done,) = trainer.train_many([Job(0, 0, 0, trainer.start(), trains=case.trains)])
    assert isinstance(done, Done), done
    return {"loading MB": loading, "measured MB": status("VmHWM"), "anonymous MB after": status("RssAnon")}


def export(case: Case, out: Path) -> None:
    """The case's kit."""
    from fedpeft.training.export_step import export_step
    from fedpeft.training.loop import TorchTrainer

    found = experiment(settings(case))
    trainer = TorchTrainer.load(found.model, found.adapter, found.training, rows(case), derive(found.seed, "start"))
    out.mkdir(parents=True)
    export_step(trainer, out)


def predicted(case: Case) -> dict[str, float]:
    """The plan's parts of the peak, in MB."""
    from fedpeft.run.plan import wish

    found = experiment(settings(case))
    engine = "onnx" if case.runtime == "onnx" else "torch"
    fit = wish(found.model, found.adapter, found.training, case.is_dialogue, 3, case.trains == "ab", (engine,)).fit
    parts = {name: value / 1e6 for name, value in asdict(fit.parts).items()}
    return {"predicted MB": fit.parts.total / 1e6, **parts}


def call(arguments: list[str]) -> str:
    """What this script prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{arguments}: {done.stderr[-2000:]}")
    return done.stdout


def main(cases: tuple[Case, ...], name: str) -> None:
    """A row for each case. The first run of a model converts and packs it; the second is counted."""
    from measure import save

    table = []
    with TemporaryDirectory() as scratch:
        kits = Kits(Path(scratch))
        for case in cases:
            given = asdict(case) | ({"kit": kits.of(case)} if case.runtime == "onnx" else {})
            if case.runtime == "torch":
                call(["measure", json.dumps(given)])
            found = json.loads(call(["measure", json.dumps(given)]).splitlines()[-1])
            told = predicted(case)
            what = {n: x for n, x in given.items() if n != "kit" and x not in (None, "", [], ())}
            table.append(what | told | found | {"predicted / measured": told["predicted MB"] / found["measured MB"]})
            print(table[-1], flush=True)
    if name:
        save(name, table)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main(CASES, "plan")
        case ["--try"]:
            main(TRIES, "")
        case ["measure", given]:
            made = json.loads(given)
            print(json.dumps(child(Case(**made | {"targets": tuple(made["targets"])}))))
        case ["export", given, out]:
            made = json.loads(given)
            export(Case(**made | {"targets": tuple(made["targets"])}), Path(out))
        case _:
            raise SystemExit("usage: python benchmarks/plan.py [--try]")
