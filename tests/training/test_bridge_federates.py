"""Any peft method federates: a round with three clients, and a fresh process that rebuilds the server's model."""

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.adapters import same
from fedpeft.training.bridge import Bridge
from tests.training.peft_cases import (
    CASES,
    PEFT_WARNINGS,
    Case,
    build,
    changed,
    logits,
    one_round,
    without_head,
)

pytestmark = [pytest.mark.filterwarnings(x) for x in PEFT_WARNINGS]
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one round of a case came to, and what the fresh process said of it."""

    logits: NDArray[np.float32]
    rebuilt: NDArray[np.float32]
    moved: float
    base_changed: list[str]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Seen | Exception]]:
    """All rounds, then one fresh process for all of them; a round that failed is its exception."""
    folder = tmp_path_factory.mktemp("rounds")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The same order of sums in both processes.
    rounds = {}
    for case in CASES:
        try:
            rounds[case.name] = play(case, folder)
        except Exception as error:  # Told by the case's own test.
            rounds[case.name] = error
    torch.set_num_threads(threads)
    command = [sys.executable, "-m", "tests.training.rebuild_models", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(folder / "logits.npz") as rebuilt:
        yield {n: x if isinstance(x, Exception) else Seen(x[0], rebuilt[n], *x[1:]) for n, x in rounds.items()}


def play(case: Case, folder: Path) -> tuple[NDArray[np.float32], float, list[str]]:
    """One round: the server's logits, how far the method alone moved them, and what of the base is not as it was."""
    model = build(case.model)
    base = dict(model.named_parameters())
    untouched = {n: x.detach().clone() for n, x in base.items()}
    bridge = Bridge.attach(model, case.method, case.task, seed=1)
    start = bridge.read()
    state = one_round(bridge, case.model)
    (folder / f"{case.name}.pickle").write_bytes(pickle.dumps(state.adapter))
    bridge.write(state.adapter)
    assert same(bridge.read(), state.adapter)
    said = logits(bridge.model, case.model)
    bridge.write(without_head(state.adapter, start))
    trained = logits(bridge.model, case.model)
    bridge.write(start)
    moved = float((trained - logits(bridge.model, case.model)).abs().max())
    ours = {id(x) for x in bridge.trainable("ab").values()}
    there = {id(x) for x in bridge.model.parameters()}
    assert all(id(x) in there for x in base.values()), "the method put other tensors in place of the base's"
    kept = {n: x for n, x in base.items() if id(x) not in ours}
    return said.numpy(), moved, changed(untouched, kept)


@pytest.mark.parametrize("case", CASES, ids=lambda x: x.name)
def test_a_fresh_process_rebuilds_the_servers_model_bit_for_bit(
    case: Case, seen: Mapping[str, Seen | Exception]
) -> None:
    got = seen[case.name]
    if isinstance(got, Exception):
        raise got
    np.testing.assert_array_equal(got.rebuilt, got.logits)
    assert got.moved > 0, "the round left the method's own tensors without effect, so this shows nothing"
    assert got.base_changed == []
