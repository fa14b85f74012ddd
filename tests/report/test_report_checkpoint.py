"""Checkpoints: exact, whole, refused when a bit is wrong."""

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedpeft.adapters import Adapter, LowRank, same
from fedpeft.errors import DataError
from fedpeft.report import Checkpoints, settled
from fedpeft.report.checkpoint import decode, encode, read
from fedpeft.rules import ServerState, Task


def state(round: int = 7, seed: int = 0) -> ServerState:
    """Every kind of tensor, of unequal sizes, with numbers that text would not keep."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 11)).astype(np.float32)
    a[0, 0], a[0, 1], a[1, 2] = -0.0, np.float32(1e-45), np.nextafter(np.float32(1), np.float32(2))
    adapter = Adapter(
        layers={
            "model/layer.0/query": LowRank(a, rng.normal(size=(5, 3)).astype(np.float32), 0.1 + 0.2),
            "value": LowRank(rng.normal(size=(2, 7)), rng.normal(size=(9, 2)), 1 / 3),
        },
        dense={"head/weight": rng.normal(size=(4, 6)).astype(np.float16), "bias": np.zeros((0, 3), np.float32)},
        fixed={
            "projection": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
            "indices": np.arange(6, dtype=np.int64).reshape(2, 3),
            "mask": np.array([True, False]),
            "spectrum": rng.normal(size=3) + 1j,
            "scalar": np.array(2.5),
            "big end": np.arange(3, dtype=">f4"),
        },
    )
    return ServerState(
        task=Task(adapter.spec, round, 0, {"y": rng.normal(size=(2, 2))}),
        adapter=adapter,
        tail={"value": LowRank(rng.normal(size=(1, 7)), rng.normal(size=(9, 1)), 2**0.5)},
        memory={"basis/q": rng.normal(size=(8, 2))},
        moments={"v/value/a": rng.normal(size=(2, 7)), "m/value/a": np.full((2, 7), np.inf)},
    )


def assert_equal(x: ServerState, y: ServerState) -> None:
    assert same(x.adapter, y.adapter)
    assert (x.task.round, x.task.pass_, x.task.spec) == (y.task.round, y.task.pass_, y.task.spec)
    assert x.tail.keys() == y.tail.keys()
    assert all(x.tail[n].scale == y.tail[n].scale for n in x.tail)
    for mine, other in (
        (x.memory, y.memory),
        (x.moments, y.moments),
        (x.task.shared, y.task.shared),
        ({n: v.a for n, v in x.tail.items()}, {n: v.a for n, v in y.tail.items()}),
        ({n: v.b for n, v in x.tail.items()}, {n: v.b for n, v in y.tail.items()}),
    ):
        assert list(mine) == list(other)
        assert all(mine[n].dtype == other[n].dtype and mine[n].tobytes() == other[n].tobytes() for n in mine)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    extras = {"selection": {"seed": 2**63 - 1}, "bytes": [1, 2.5, None, "ü"], "epsilon": 0.1 + 0.2}
    path = Checkpoints(tmp_path / "checkpoints").save(state(), extras)
    found = Checkpoints(tmp_path / "checkpoints").load()
    assert path.name == "round-00007.safetensors"
    assert_equal(found.state, state())
    assert (found.extras, found.path, found.damaged) == (extras, path, ())
    assert list(found.state.adapter.layers) == list(state().adapter.layers)


def test_what_comes_back_can_be_written_to_and_is_laid_out_plainly() -> None:
    turned = replace(state(), memory={"m": np.arange(12.0).reshape(3, 4).T})
    for found in (decode(encode(turned, {}))[0], settled(turned)):
        assert found.memory["m"].flags.c_contiguous
        assert found.memory["m"].flags.writeable
        np.testing.assert_array_equal(found.memory["m"], turned.memory["m"])


def test_the_same_state_gives_the_same_file() -> None:
    assert encode(state(), {"b": 1, "a": 2}) == encode(state(), {"b": 1, "a": 2})


def test_the_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    path = Checkpoints(tmp_path).save(state(), {})
    with safe_open(path, framework="np") as file:
        x = file.get_tensor("layers.a/model/layer.0/query")
    np.testing.assert_array_equal(x, state().adapter.layers["model/layer.0/query"].a)


CONTENT = encode(state(), {"k": 1})


@settings(deadline=None)
@given(place=st.integers(0, len(CONTENT) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(place: int, bit: int) -> None:
    broken = bytearray(CONTENT)
    broken[place] ^= 1 << bit
    with pytest.raises(DataError, match="damaged"):
        decode(bytes(broken))


@settings(deadline=None)
@given(length=st.integers(0, len(CONTENT) - 1))
def test_any_cut_is_found(length: int) -> None:
    with pytest.raises(DataError, match="damaged"):
        decode(CONTENT[:length])


def test_more_at_the_end_is_found() -> None:
    with pytest.raises(DataError, match="damaged"):
        decode(CONTENT + b"\0")


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for t in range(1, 6):
        Checkpoints(tmp_path).save(state(t), {})
    assert [x.name for x in Checkpoints(tmp_path).files()] == ["round-00004.safetensors", "round-00005.safetensors"]
    Checkpoints(tmp_path, keep=3).save(state(6), {})
    assert len(Checkpoints(tmp_path).files()) == 3
    with pytest.raises(ValueError, match="keep: got 0; want at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_a_damaged_newest_is_passed_over_and_said(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(state(1), {"t": 1})
    newest = store.save(state(2), {"t": 2})
    newest.write_bytes(newest.read_bytes()[:-1])
    found = store.load()
    assert found.extras == {"t": 1}
    assert_equal(found.state, state(1))
    assert len(found.damaged) == 1
    assert str(newest) in found.damaged[0]
    with pytest.raises(DataError, match=r"round-00002\.safetensors: damaged"):
        read(newest)


def test_a_run_that_goes_back_removes_what_came_later(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=3)
    for t in (1, 2, 3):
        store.save(state(t), {})
    store.save(state(2, seed=9), {})
    assert_equal(store.load().state, state(2, seed=9))
    assert [x.name for x in store.files()] == ["round-00001.safetensors", "round-00002.safetensors"]


def test_no_checkpoint_and_none_intact_are_told_apart(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    with pytest.raises(DataError, match="no checkpoint; start the run anew"):
        store.load()
    (tmp_path / "round-00001.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"no checkpoint is intact: .*round-00001.*start the run anew"):
        store.load()


def test_another_schema_is_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft.report.checkpoint.SCHEMA", 2)
    newer = encode(state(), {})
    monkeypatch.undo()
    with pytest.raises(DataError, match="has schema 2; this version reads schema 1"):
        decode(newer)


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(tmp_path)
    for t in (1, 2):
        store.save(state(t), {})
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}

    def full(file: int, content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match=r"round-00003\.safetensors: not written, the disk is full"):
        store.save(state(3), {})
    assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before
    assert_equal(store.load().state, state(2))


def test_extras_that_json_would_change_are_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        encode(state(), {"x": float("nan")})


def test_what_numpy_does_not_know_comes_back_in_a_process_that_has_not_met_it(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(state(), {})
    script = (
        "import sys; from pathlib import Path; from fedpeft.report import Checkpoints\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "x = Checkpoints(Path(sys.argv[1])).load().state.adapter.fixed['projection']\n"
        "print(x.dtype.name, x.tobytes().hex())\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bfloat16", state().adapter.fixed["projection"].tobytes().hex()]


def test_a_tensor_that_holds_no_numbers_is_refused() -> None:
    odd = replace(state(), memory={"m": np.array([None])})
    with pytest.raises(ValueError, match="a checkpoint holds numbers; got an array of Python objects"):
        encode(odd, {})


def test_a_path_that_is_no_file_or_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "round-00001.safetensors").mkdir()
    with pytest.raises(DataError, match=r"round-00001\.safetensors: can't be read"):
        read(tmp_path / "round-00001.safetensors")
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(DataError, match=r"round-00007\.safetensors: not written \(File exists\)"):
        Checkpoints(tmp_path / "checkpoints").save(state(), {})


KILLED = """
import sys
from pathlib import Path
import numpy as np
from fedpeft.adapters import Adapter, LowRank
from fedpeft.report import RoundRecord, RunFolder
from fedpeft.rules import ServerState, Task

folder = RunFolder.open(Path(sys.argv[1]))
print("ready", flush=True)
for t in range(1, 100_000):
    a = np.full((4, 2000), t, np.float32)
    adapter = Adapter({"q": LowRank(a, np.full((300, 4), -t, np.float32), 2.0)})
    folder.append(RoundRecord(round=t, asked=tuple(range(300)), seconds=float(t)))
    folder.checkpoints.save(ServerState(Task(adapter.spec, t), adapter), {"t": t})
"""


@pytest.mark.parametrize("delay", [0.02, 0.07, 0.11, 0.19, 0.31])
def test_a_run_killed_at_any_moment_can_be_taken_up(tmp_path: Path, delay: float) -> None:
    from fedpeft.report import RoundRecord, RunFolder, history

    folder = RunFolder.create(tmp_path / "run", "seed = 1\n")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder.path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        while not folder.checkpoints.files():
            time.sleep(0.005)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
    found = folder.checkpoints.load()
    t = found.state.task.round
    assert found.damaged == ()
    assert found.extras == {"t": t}
    assert (found.state.adapter.layers["q"].a == t).all()
    recorded = [x.round for x in history(folder.path).rounds]
    assert recorded in (list(range(1, t + 1)), list(range(1, t + 2)))  # a round is recorded before it is saved
    again = RunFolder.open(folder.path)
    again.rewind(t)
    again.append(RoundRecord(round=t + 1, seconds=0.5))
    seen = history(folder.path).rounds
    assert [x.round for x in seen] == list(range(1, t + 2))
    assert seen[-1].seconds == 0.5
