"""Whole simulated runs of clients that train by forward passes alone: in the clear, secure, cut off, hostile, coded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import walk_of
from fedpeft.config import experiment
from fedpeft.errors import ConfigError
from fedpeft.report import RunFolder
from fedpeft.run import simulate
from fedpeft.run.forecast import forecast
from tests.run.secured import Ended, Quiet, Wire, ended, rows

SIZE = 96
WALK = {"name": "fedkseed", "size": SIZE}
COUNTS = (9, 12, 10, 14, 11, 8)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("walks") / "own.csv", COUNTS)


def run_of(table: Path, **more: Any) -> Any:
    settings: dict[str, Any] = {
        "rounds": 2,
        "model": {"name": "tiny-bert"},
        "adapter": {"rank": 2},
        "data": {"name": str(table)},
        "partition": {"name": "natural", "least": 1},
        "split": {"test": 0, "validation": 0, "central": 0},
        "training": {"optimiser": "sgd", "lr": 0.01, "length": 8, "threads": 1, "steps": 3, "batch": 4},
        "rule": WALK,
        "evaluation": {"clients": False, "central": False},
        "baselines": {"base": False},
    }
    return experiment(settings | more)


def tensors(found: Ended) -> dict[str, np.ndarray]:
    return dict(found.state.adapter.tensors())


def apart(one: Ended, other: Ended) -> float:
    theirs = tensors(other)
    return max(float(np.abs(x - theirs[n]).max()) for n, x in tensors(one).items())


def test_the_server_replays_what_clients_trained_and_their_answers_are_scalars(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire().tap(monkeypatch)
    found = run_of(table, training={**run_of(table).settings["training"], "steps": 12})
    done = ended(found, tmp_path / "run")
    pool = found.rule.pool
    assert pool is not None
    assert len(wire.jobs) == 12
    for job, result in wire.jobs:
        assert result.moves is not None
        replayed = pool.moved(job.start.tensors(), result.moves.astype(np.float32))  # as it travels
        for n, x in result.trained.tensors().items():
            assert np.abs(replayed[n] - x).max() <= 1e-6
    last = [(job, result) for job, result in wire.jobs if job.round == 1]
    weights = np.array([COUNTS[job.client] for job, _ in last], np.float64)
    for n, x in tensors(done).items():
        each = [result.trained.tensors()[n].astype(np.float64) for _, result in last]
        mean = sum(w * y for w, y in zip(weights, each, strict=True)) / weights.sum()
        np.testing.assert_allclose(x, mean, atol=1e-6)
    sizes = [x.parcel.tensors for x in wire.sent if x.parcel.kind == "term"]
    assert len(sizes) == 12
    assert max(sum(x.nbytes for x in each.values()) for each in sizes) <= 4 * (SIZE + 5)
    first, second = done.history.rounds
    assert second.bytes_down < first.bytes_down - 6 * 4 * sum(x.size for x in tensors(done).values())
    assert 6 * 4 * SIZE < second.bytes_down < 6 * (4 * SIZE + 1500)  # with the settings, which travel each time
    assert second.bytes_up < 6 * (4 * SIZE + 500)
    told = forecast(found)
    assert told.bytes_down == 4 * SIZE
    assert told.bytes_up == 4 * (SIZE + 5)
    assert told.bytes_once == 4 * sum(x.size for x in tensors(done).values()) + 16
    assert told.together == 1


def test_a_secure_run_ends_as_in_the_clear(table: Path, tmp_path: Path) -> None:
    own = {"weighting": {"name": "examples", "cap": 20}, "rounds": 1}
    clear = ended(run_of(table, **own), tmp_path / "clear")
    secure = ended(run_of(table, **own, secagg={"name": "full"}), tmp_path / "secure")
    mine, theirs = walk_of(clear.state.adapter), walk_of(secure.state.adapter)
    assert mine is not None
    assert theirs is not None
    assert np.abs(mine).max() > 1e-3
    np.testing.assert_allclose(mine, theirs, atol=1e-6)  # of the ring's grid, whose step is finer
    assert apart(clear, secure) <= 1e-5  # of as many moves as there are directions
    assert len(secure.history.rounds[0].survivors) == len(COUNTS)


class StoppedError(Exception):
    pass


class Impatient(Quiet):
    """Stops within the second round, when a client has answered."""

    has_begun = False

    def round(self, *args: Any) -> None:
        self.has_begun = True

    def advance(self) -> None:
        if self.has_begun:
            raise StoppedError


def test_a_run_that_was_cut_off_ends_in_the_same_bits(table: Path, tmp_path: Path) -> None:
    found = run_of(table, server={"name": "momentum"})
    whole = ended(found, tmp_path / "whole")
    with pytest.raises(StoppedError):
        simulate(found, tmp_path / "broken", Impatient())
    ended(found, tmp_path / "broken")
    files = [RunFolder.open(tmp_path / x).checkpoints.files()[-1].read_bytes() for x in ("whole", "broken")]
    assert files[0] == files[1]
    assert set(whole.state.moments) == {"v/moves"}


@pytest.mark.parametrize("attack", ["flip", "noise"])
def test_a_hostile_client_lies_about_its_moves(table: Path, tmp_path: Path, attack: str) -> None:
    honest = ended(run_of(table, rounds=1), tmp_path / "honest")
    lying = {"hostile": {"share": 0.2, "attack": attack, "strength": 50.0}}
    fooled = ended(run_of(table, rounds=1, simulation=lying), tmp_path / attack)
    (one,) = fooled.history.rounds
    assert one.refused == ()
    before, after = (np.linalg.norm(walk_of(x.state.adapter)) for x in (honest, fooled))  # type: ignore[arg-type]
    assert after > 2 * before


def test_moves_can_be_coded_both_ways(table: Path, tmp_path: Path) -> None:
    wide = {"name": "fedkseed", "size": 300}  # codecs leave tensors of less than 256 numbers alone
    plain = ended(run_of(table, rule=wide), tmp_path / "plain")
    coded = ended(run_of(table, rule=wide, compression={"up": "int8", "down": "int8"}), tmp_path / "coded")
    assert apart(plain, coded) > 0
    mine, theirs = (walk_of(x.state.adapter) for x in (plain, coded))
    assert mine is not None
    assert theirs is not None
    assert np.linalg.norm(mine - theirs) < 0.1 * np.linalg.norm(mine)


def test_a_pool_that_is_too_small_for_a_codec_is_refused(table: Path) -> None:
    for way in ({"up": "int8", "down": "none"}, {"up": "none", "down": "int8"}):
        key = next(k for k, x in way.items() if x == "int8")
        with pytest.raises(ConfigError, match=f"^compression.{key}: got 'int8', which .* of this adapter has {SIZE};"):
            forecast(run_of(table, compression=way))
