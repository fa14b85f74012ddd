"""Packed bases in files: where tensors are, that others can read them, and what is said of damaged ones."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft.errors import DataError
from fedpeft.training.formats import pack, unpack
from fedpeft.training.packed_file import ALIGNED, Held, read, write

RNG = np.random.default_rng(3)
WIDE, TALL, NARROW = (RNG.standard_normal(x).astype(np.float32) for x in ((5, 70), (7, 3), (2, 9)))
CONTENT = {
    "wide": pack(WIDE, "int8"),
    "tall.weight": pack(TALL, "nf4"),
    "narrow": pack(NARROW, "int4"),
    "norm": np.array([1.5, -2.0, 0.25], np.float32),
    "places": np.arange(4),
    "on": np.array([True, False, True]),
}


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "base.safetensors", CONTENT, frozenset({"tall.weight"}), {"plain": "ab", "quantise": "int8"})
    return tmp_path / "base.safetensors"


def test_what_was_written_is_read(file):
    found = read(file)
    assert found.path == file
    assert found.facts == {"plain": "ab", "quantise": "int8"}
    assert found.held == (
        Held("wide", "int8", 70, False),
        Held("tall.weight", "nf4", 3, True),
        Held("narrow", "int4", 9, False),
    )
    assert found.formats == {"int8", "nf4", "int4"}
    for held in found.held:
        got, want = found.matrix(held), CONTENT[held.name]
        np.testing.assert_array_equal(unpack(got), unpack(want))
        assert (got.codes.dtype, got.scales.dtype) == (want.codes.dtype, want.scales.dtype)
    assert found.whole.keys() == {"norm", "places", "on"}
    for name, x in found.whole.items():
        np.testing.assert_array_equal(x, CONTENT[name])
        assert x.dtype == CONTENT[name].dtype


def test_tensors_start_at_multiples_of_64_bytes_and_are_where_it_says(file):
    found, raw = read(file), file.read_bytes()
    assert ALIGNED == 64
    assert found.places.keys() == found.tensors.keys()
    for name, (offset, length) in found.places.items():
        assert offset % 64 == 0
        assert raw[offset : offset + length] == found.tensors[name].tobytes()


def test_safetensors_reads_it_too(file):
    theirs = load_file(file)
    for name, x in read(file).tensors.items():
        np.testing.assert_array_equal(theirs[name], x)
    assert all(name.startswith("gap.") for name in theirs.keys() - read(file).tensors.keys())


def test_arrays_are_mapped_and_can_not_be_written(file):
    for x in read(file).tensors.values():
        assert not x.flags.writeable
        owner = x
        while owner.base is not None and not isinstance(owner, np.memmap):
            owner = owner.base
        assert isinstance(owner, np.memmap)


def test_the_same_content_gives_the_same_bytes(file, tmp_path):
    write(tmp_path / "again", CONTENT, frozenset({"tall.weight"}), {"plain": "ab", "quantise": "int8"})
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_a_changed_byte_is_found_and_without_a_check_it_is_not(file):
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"base\.safetensors.*not those that were written.*make it again"):
        read(file)
    assert read(file, check=False).facts["plain"] == "ab"


@pytest.mark.parametrize("cut", [0, 4, 30, 200, -1])
def test_a_file_that_was_cut_is_refused_even_without_a_check(file, cut):
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match="damaged"):
        read(file, check=False)


def test_another_ones_file_and_a_later_version_are_refused(file, tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other")
    with pytest.raises(DataError, match="no packed base"):
        read(tmp_path / "other")
    with pytest.raises(DataError, match="no packed base"):
        read(tmp_path / "absent")
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    told = json.loads(header["__metadata__"]["fedpeft"]) | {"format": 2}
    header["__metadata__"]["fedpeft"] = json.dumps(told)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    with pytest.raises(DataError, match="got a packed base of format 2; want 1"):
        read(file)


def test_what_can_not_be_held_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x is of complex64; want one of int8, uint8, float16"):
        write(tmp_path / "x", {"x": np.zeros(2, np.complex64)})
    with pytest.raises(ValueError, match=r"two tensors named wide\.codes"):
        write(tmp_path / "x", {"wide": CONTENT["wide"], "wide.codes": np.zeros(2, np.float32)})
