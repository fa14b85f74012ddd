"""Kits that are brought to devices: whole and only whole, whatever is lost, late, damaged or full on the way."""

import json
import os
import shutil
from collections import namedtuple
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from fedpeft.errors import DataError, ProtocolError
from fedpeft.flower import Shelf, errand, shipping
from fedpeft.flower.errand import Errand
from fedpeft.flower.kits import Chunk, Lack, Piece, Place, pack_chunk, pack_lack, unpack_chunk, unpack_lack
from fedpeft.flower.packing import Parcel, pack
from tests.flower.devices import LARGE, contents, make_kit, world
from tests.flower.grids import one_round


def piece(file: str, offset: int, size: int, count: int, dtype: type = np.uint8) -> Piece:
    return Piece((file, offset), size, np.zeros(count, dtype))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a hundred thousand bytes, so that a small kit takes several."""
    for name in ("SMALLEST", "LARGEST"):
        monkeypatch.setattr(errand, name, 100_000)
    monkeypatch.setattr(shipping, "Errand", partial(Errand, chunk=100_000))


def test_devices_that_lack_the_kit_get_it_and_take_part(tmp_path: Path) -> None:
    run = world(tmp_path, 2)
    fleet, mine = run.muster(2), run.shipping.bytes
    assert (dict(fleet.nodes), fleet.refused) == ({0: 1, 1: 2}, ())
    for i in range(2):
        (whole,) = (tmp_path / "devices" / str(i)).iterdir()
        assert whole.name == run.shipping.digest
        assert contents(whole) == contents(tmp_path / "kit")
    assert [size for node, size in run.devices.brought if node == 1] == [100_000] * 7 + [mine % 100_000]
    assert run.said[0].startswith(f"node 1: gets the kit {run.shipping.digest[:16]}…, 0.7 MB (has none)")
    assert run.said[2].startswith("node 1: has the kit after ")
    assert run.said[2].endswith(" s, 0.7 MB in 8 messages")
    traffic = run.shipping.take_traffic()
    assert 2 * LARGE < traffic.bytes_down < 2 * LARGE + 20_000
    assert 0 < traffic.bytes_up < 20_000
    assert run.shipping.take_traffic().bytes_down == 0
    outcome, _ = one_round(fleet, [0, 1])
    assert outcome.survivors == (0, 1)


def test_a_kit_that_is_there_is_not_sent_again(tmp_path: Path) -> None:
    run = world(tmp_path, 1)
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "0" / run.shipping.digest)
    assert list(run.muster(1).nodes) == [0]
    assert (run.devices.brought, run.said, run.shipping.take_traffic().bytes_down) == ([], [], 0)


def test_a_chunk_that_is_lost_is_sent_again_and_one_that_comes_twice_is_kept_once(tmp_path: Path) -> None:
    run = world(tmp_path, 1, spoil={2: "lost", 4: "twice"})
    assert list(run.muster(1, patience=1000.0).nodes) == [0]
    assert contents(tmp_path / "devices" / "0" / run.shipping.digest) == contents(tmp_path / "kit")
    assert len(run.devices.brought) == 9
    assert run.clock.now >= shipping.PATIENCE


def test_a_file_that_was_damaged_on_the_device_is_fetched_again(tmp_path: Path) -> None:
    run = world(tmp_path, 1, spoil={5: "rots"})
    assert list(run.muster(1).nodes) == [0]
    assert contents(tmp_path / "devices" / "0" / run.shipping.digest) == contents(tmp_path / "kit")
    assert len(run.devices.brought) == 8 + 8  # the large file once more, and what came with its end


def test_a_file_that_comes_damaged_time_and_again_is_refused_and_the_others_begin(tmp_path: Path) -> None:
    run = world(tmp_path, 2, spoil=dict.fromkeys(range(3, 200), "rots"))
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "1" / run.shipping.digest)
    fleet = run.muster(2)
    assert list(fleet.nodes) == [1]
    assert fleet.refused[0].startswith("node 1: kit: base.safetensors came damaged: its SHA-256 is ")
    assert run.said[-1].endswith("(5 times)")
    sent = len(run.devices.brought)
    fleet.meet()  # it is asked nothing more
    assert len(run.devices.brought) == sent


def test_a_kit_that_rots_in_the_coordinators_folder_is_found_out_by_the_devices(tmp_path: Path) -> None:
    run = world(tmp_path, 1)
    (tmp_path / "kit" / "step.onnx").write_bytes(b"grapf")
    with pytest.raises(ProtocolError, match=r"no node can take part: .*step\.onnx came damaged"):
        run.muster(1)


def test_a_kit_that_is_gone_at_the_coordinator_stops_nobody_else(tmp_path: Path) -> None:
    run = world(tmp_path, 2)
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "1" / run.shipping.digest)
    (tmp_path / "kit" / "base.safetensors").unlink()
    fleet = run.muster(2)
    assert list(fleet.nodes) == [1]
    assert "No such file" in fleet.refused[0]


def test_a_node_that_vanishes_in_the_middle_is_left_out_and_the_rest_begin(tmp_path: Path) -> None:
    run = world(tmp_path, 2, spoil={6: "vanish"})
    fleet = run.muster(2, patience=1000.0)
    assert len(fleet.nodes) == 1
    assert "went away before it had the run's kit" in fleet.refused[0]
    assert any("went away with its kit at base.safetensors, byte" in line for line in run.said)


def test_a_device_goes_on_where_it_was_when_it_comes_back(tmp_path: Path) -> None:
    run = world(tmp_path, 1, spoil={4: "vanish"})
    with pytest.raises(ProtocolError, match="went away"):
        run.muster(1, patience=1000.0)
    run.devices.gone.clear()
    before = len(run.devices.brought)
    assert list(run.muster(1).nodes) == [0]
    assert len(run.devices.brought) - before == 8 - 4  # four are there


def test_a_full_disk_is_a_refusal_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("fedpeft.flower.shelf.shutil.disk_usage", lambda path: usage(0, 0, 500_000))
    run = world(tmp_path, 2)
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "1" / run.shipping.digest)
    fleet = run.muster(2)
    assert list(fleet.nodes) == [1]
    assert "has room for 0 MB, and 1 MB of the run's kit are to come; want room there" in fleet.refused[0]


def test_an_error_of_the_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest, shelf = make_kit(tmp_path / "kit"), Shelf(tmp_path / "shelf")
    bring(shelf, tmp_path / "kit", digest, messages=3)
    lack = shelf.lacks(digest)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedpeft.flower.shelf._write", full)
    with pytest.raises(DataError, match="No space left on device; want a folder with room"):
        bring(shelf, tmp_path / "kit", digest, messages=1)
    assert shelf.lacks(digest) == lack


def test_a_device_that_asks_for_another_kit_is_refused(tmp_path: Path) -> None:
    run = world(tmp_path, 2, wants="ab" * 32)
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "1" / ("ab" * 32))
    fleet = run.muster(2)
    assert list(fleet.nodes) == [1]
    digest = run.shipping.digest[:16]
    assert fleet.refused == (f"node 1: kit: it asks for the kit abababababababab…; the run's is {digest}…",)
    assert run.devices.brought == []


def test_no_more_than_so_many_devices_are_served_at_once(tmp_path: Path) -> None:
    run = world(tmp_path, 11)
    assert len(run.muster(11, patience=1000.0).nodes) == 11
    assert run.devices.most == shipping.AT_ONCE == 8
    assert max(size for _, size in run.devices.brought) == 100_000


def test_a_run_begins_without_a_slow_device_which_takes_part_once_it_has_the_kit(tmp_path: Path) -> None:
    run = world(tmp_path, 2, spoil=dict.fromkeys(range(3, 5), "lost"))
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "1" / run.shipping.digest)
    fleet = run.muster(2, patience=60.0)
    assert (list(fleet.nodes), run.shipping.is_serving) == ([1], True)
    assert fleet.refused == ("node 1: no answer to a query before the deadline",)
    assert run.clock.now < 70
    told: tuple[str, ...] = ()
    while run.shipping.is_serving and run.clock.now < 5000:
        told += fleet.meet()
        run.clock.sleep(30.0)
    told += fleet.meet() + fleet.meet()
    assert list(fleet.nodes) == [0, 1], (told, run.said)


def test_a_slow_device_is_waited_for_where_there_would_be_too_few_without_it(tmp_path: Path) -> None:
    run = world(tmp_path, 2, spoil=dict.fromkeys(range(3, 5), "lost"))
    shutil.copytree(tmp_path / "kit", tmp_path / "devices" / "1" / run.shipping.digest)
    assert list(run.muster(2, patience=60.0, least=2).nodes) == [0, 1]
    assert run.clock.now > 2 * shipping.PATIENCE


def test_a_kit_that_is_lost_in_the_middle_of_a_run_is_sent_again_within_the_round(tmp_path: Path) -> None:
    run = world(tmp_path, 2)
    fleet = run.muster(2)
    shutil.rmtree(tmp_path / "devices" / "0")
    outcome, traffic = one_round(fleet, [0, 1])
    assert outcome.survivors == (0, 1)
    assert run.shipping.take_traffic().bytes_down > 3 * LARGE  # the two of the muster, and this one
    assert traffic.bytes_down < LARGE  # a round's own are its own


def test_a_kit_that_has_rotted_is_mended_by_its_bad_file_alone(tmp_path: Path) -> None:
    digest, shelf = make_kit(tmp_path / "kit"), Shelf(tmp_path / "shelf")
    bring(shelf, tmp_path / "kit", digest)
    assert shelf.mend(digest) is False
    (shelf.folder / digest / "step.onnx").write_bytes(b"grapf")
    assert shelf.mend(digest) is True
    assert (shelf.kit(digest), shelf.lacks(digest)) == (None, Lack(digest, ("step.onnx", 0)))
    bring(shelf, tmp_path / "kit", digest, messages=1)
    assert contents(shelf.folder / digest) == contents(tmp_path / "kit")
    (shelf.folder / digest / "kit.json").write_bytes(b"{}")
    assert shelf.mend(digest) is True
    assert shelf.lacks(digest) == Lack(digest, ("kit.json", 0))
    bring(shelf, tmp_path / "kit", digest, messages=1)
    assert contents(shelf.folder / digest) == contents(tmp_path / "kit")


def test_kits_of_earlier_runs_make_room_for_one_that_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE_LIMIT", "1.5MB")
    folder = tmp_path / "shelf"
    digests = [make_kit(tmp_path / str(i), i) for i in range(4)]
    for i, age in ((0, 10), (1, 20)):
        shutil.copytree(tmp_path / str(i), folder / digests[i])
        os.utime(folder / digests[i], (1000 - age, 1000 - age))
    for name in ("notes", "ab" * 32):  # a user's, whatever they are called
        (folder / name).mkdir()
        (folder / name / "large").write_bytes(bytes(1_000_000))
        os.utime(folder / name, (1, 1))
    bring(Shelf(folder), tmp_path / "2", digests[2])
    assert {x.name for x in folder.iterdir()} == {digests[0], digests[2], "notes", "ab" * 32}
    assert Shelf(folder).kit(digests[0]) is not None  # in use, by this process
    bring(Shelf(folder), tmp_path / "3", digests[3], messages=3)
    assert {x.name for x in folder.iterdir()} == {digests[0], digests[2], f"{digests[3]}.part", "notes", "ab" * 32}
    bring(Shelf(folder), tmp_path / "3", digests[3])
    assert Shelf(folder).kit(digests[3]) is not None


def test_a_kit_on_its_way_is_in_use_with_each_of_its_messages(tmp_path: Path) -> None:
    """Else another process that makes room takes a large file's folder for the oldest."""
    digest, shelf = make_kit(tmp_path / "kit"), Shelf(tmp_path / "shelf")
    bring(shelf, tmp_path / "kit", digest, messages=2)
    parts = shelf.folder / f"{digest}.part"
    os.utime(parts, (1, 1))
    file, offset = shelf.lacks(digest).place
    assert (file, offset > 0) == ("base.safetensors", True)
    bring(shelf, tmp_path / "kit", digest, messages=1)
    assert parts.stat().st_mtime > 1e9


def test_two_processes_that_share_a_shelf_fetch_a_kit_in_common(tmp_path: Path) -> None:
    digest, one, other = make_kit(tmp_path / "kit"), Shelf(tmp_path / "shelf"), Shelf(tmp_path / "shelf")
    while (place := one.lacks(digest).place)[0]:
        chunk = read(tmp_path / "kit", digest, place)
        assert one.put(chunk).place == other.put(chunk).place
    assert contents(other.folder / digest) == contents(tmp_path / "kit")


def test_bytes_that_are_not_the_next_ones_are_not_kept(tmp_path: Path) -> None:
    digest, shelf = make_kit(tmp_path / "kit"), Shelf(tmp_path / "shelf")
    late = read(tmp_path / "kit", digest, ("base.safetensors", 100_000))
    assert shelf.put(late) == Lack(digest, ("kit.json", 0))
    assert not (tmp_path / "shelf").exists()
    bring(shelf, tmp_path / "kit", digest, messages=1)
    assert shelf.put(late) == Lack(digest, ("base.safetensors", 0), ("step.onnx", "chat_template.jinja"))


def test_another_manifest_than_the_digest_says_is_not_kept(tmp_path: Path) -> None:
    make_kit(tmp_path / "kit")
    shelf, digest = Shelf(tmp_path / "shelf"), "ab" * 32
    lack = shelf.put(read(tmp_path / "kit", digest, ("kit.json", 0)))
    assert (lack.place, lack.has) == (("kit.json", 0), "")
    assert lack.why.startswith("kit.json came damaged: its SHA-256 is ")
    assert list((shelf.folder / f"{digest}.part").iterdir()) == []


@pytest.mark.parametrize(
    "files",
    [
        {"../base": ["ab" * 32, 1]},
        {"a/b": ["ab" * 32, 1]},
        {".hidden": ["ab" * 32, 1]},
        {"x.part": ["ab" * 32, 1]},
        {"kit.json": ["ab" * 32, 1]},
        {"": ["ab" * 32, 1]},
        {"x": ["no digest", 1]},
        {"x": ["ab" * 32, -1]},
        {"x": ["ab" * 32]},
        {f"x{i}": ["ab" * 32, 1] for i in range(65)},
        {},
        None,
    ],
)
def test_a_manifest_that_names_what_no_kit_has_is_refused(tmp_path: Path, files: object) -> None:
    text = json.dumps({"files": files}).encode()
    shelf, digest = Shelf(tmp_path / "shelf"), sha256(text).hexdigest()
    with pytest.raises(ProtocolError, match=r"kit|64 hex digits"):
        shelf.put(Chunk(digest, (Piece(("kit.json", 0), len(text), np.frombuffer(text, np.uint8)),)))
    with pytest.raises(ProtocolError, match=r"kit|64 hex digits"):
        shelf.lacks(digest)


def test_a_file_of_another_size_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    digest, shelf = make_kit(tmp_path / "kit"), Shelf(tmp_path / "shelf")
    bring(shelf, tmp_path / "kit", digest, messages=1)
    chunk = Chunk(digest, (Piece(("base.safetensors", 0), LARGE + 1, np.zeros(10, np.uint8)),))
    with pytest.raises(ProtocolError, match=r"base\.safetensors has 700001 bytes; its manifest says 700000"):
        shelf.put(chunk)
    with pytest.raises(ProtocolError, match="manifest has 16777217 bytes; want at most 16777216"):
        Shelf(tmp_path / "new").put(Chunk(digest, (Piece(("kit.json", 0), (1 << 24) + 1, np.zeros(10, np.uint8)),)))


def test_messages_come_back_as_they_were_sent() -> None:
    lack = Lack("ab" * 32, ("step.onnx", 17), ("evaluate.onnx",), "cd" * 32, "came damaged")
    assert unpack_lack(pack_lack(lack)) == lack
    assert unpack_lack(pack_lack(Lack("ab" * 32, ("", 0)))) == Lack("ab" * 32, ("", 0))
    pieces = (Piece(("step.onnx", 17), 20, np.arange(3, dtype=np.uint8)), Piece(("x", 0), 0, np.zeros(0, np.uint8)))
    chunk = unpack_chunk(pack_chunk(Chunk("ab" * 32, pieces)))
    assert (chunk.digest, [(x.place, x.size) for x in chunk.pieces]) == (
        "ab" * 32,
        [(("step.onnx", 17), 20), (("x", 0), 0)],
    )
    assert [x.content.tolist() for x in chunk.pieces] == [[0, 1, 2], []]


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (Chunk("ab", (piece("x", 0, 3, 3),)), "64 hex digits"),
        (Chunk("ab" * 32, ()), "has the pieces"),
        (Chunk("ab" * 32, (piece("x", 0, 3, 3),) * 66), "want 1 to 65"),
        (Chunk("ab" * 32, (piece("../x", 0, 3, 3),)), "want a plain name"),
        (Chunk("ab" * 32, (piece("x", 1, 3, 3),)), "has 3 bytes from 1 on, of a file of 3"),
        (Chunk("ab" * 32, (piece("x", 0, 3, 0),)), "has 0 bytes from 0 on, of a file of 3"),
        (Chunk("ab" * 32, (piece("x", 0, 3, 3, np.int8),)), "has no content; want bytes"),
        (Chunk("ab" * 32, (piece("x", -1, 3, 3),)), "want .file, offset"),
        (Chunk("ab" * 32, (piece("x", 0, -1, 0),)), "want .file, offset, size"),
    ],
)
def test_a_message_that_no_coordinator_sends_is_refused(chunk: Chunk, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        unpack_chunk(pack_chunk(chunk))


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"digest": "ab"}, "64 hex digits"),
        ({"place": ["x", -1]}, "want .file, offset"),
        ({"place": ["x"]}, "want .file, offset"),
        ({"place": ["a/b", 0]}, "want a plain name"),
        ({"rest": ["a/b"]}, "want a plain name"),
        ({"rest": ["x"] * 65}, "65 files of a kit are lacking; want at most 64"),
        ({"why": 3}, "want a string"),
        ({"more": 3}, "not known"),
    ],
)
def test_an_answer_that_no_device_gives_is_refused(facts: dict[str, object], why: str) -> None:
    good = {"digest": "ab" * 32, "place": ["x", 0], "rest": [], "has": "", "why": ""}
    assert unpack_lack(pack(Parcel("lack", good, {}))) == Lack("ab" * 32, ("x", 0))
    with pytest.raises(ProtocolError, match=why):
        unpack_lack(pack(Parcel("lack", good | facts, {})))


def test_a_message_takes_up_after_a_file_with_the_next_that_is_lacking(tmp_path: Path) -> None:
    digest = make_kit(tmp_path / "kit")
    sizes = {"kit.json": 0, "base.safetensors": LARGE, "step.onnx": 5, "chat_template.jinja": 0}
    one = Errand(1, ("base.safetensors", LARGE - 9), ("chat_template.jinja",), 0.0, chunk=12)
    found = unpack_chunk(one.packed(tmp_path / "kit", digest, sizes))
    assert [(x.place, len(x.content)) for x in found.pieces] == [
        (("base.safetensors", LARGE - 9), 9), (("chat_template.jinja", 0), 0)
    ]  # fmt: skip
    one.place, one.rest = ("base.safetensors", LARGE - 9), ("step.onnx", "chat_template.jinja")
    found = unpack_chunk(one.packed(tmp_path / "kit", digest, sizes))
    assert [(x.place, len(x.content), x.size) for x in found.pieces] == [
        (("base.safetensors", LARGE - 9), 9, LARGE), (("step.onnx", 0), 3, 5)
    ]  # fmt: skip
    assert one.bytes == 9 + 12
    for place in (("base.safetensors", LARGE + 1), ("other", 0)):
        one.place = place
        with pytest.raises(
            ProtocolError, match=f"it asks for '{place[0]}' from byte {place[1]} on, which the kit does"
        ):
            one.packed(tmp_path / "kit", digest, sizes)
    one.place = ("step.onnx", 0)
    (tmp_path / "kit" / "step.onnx").write_bytes(b"gr")
    with pytest.raises(ProtocolError, match=r"step\.onnx was cut off while it was sent"):
        one.packed(tmp_path / "kit", digest, sizes)


def test_chunks_grow_on_a_quick_link_and_shrink_on_a_slow_one() -> None:
    one = Errand(1, ("x", 0), (), 0.0, chunk=90_000)

    def went(seconds: float) -> None:
        one.went_on(Lack("ab" * 32, ("x", one.place[1] + 1), ("y",)), seconds)

    went(29.9)
    assert one.chunk == 100_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errand, "SMALLEST", 30_000)
        went(30.0)
        went(120.0)
        assert one.chunk == 100_000
        went(120.1)
        assert one.chunk == 50_000
        one.was_lost()
        assert (one.chunk, one.failed, one.message) == (30_000, 1, "")
    went(30.0)
    assert (one.failed, one.place, one.rest) == (0, ("x", 5), ("y",))


def test_a_node_that_takes_no_kits_says_so(tmp_path: Path) -> None:
    run = world(tmp_path, 1)
    run.devices._of = lambda node: shipping_of_none  # type: ignore[method-assign]
    with pytest.raises(ProtocolError, match="this node takes no kit; want runtime='onnx'"):
        run.muster(1)


def shipping_of_none(config: object) -> Shelf:
    from fedpeft.flower.apps import _no_shelf

    return _no_shelf(config)  # type: ignore[arg-type]


def read(kit: Path, digest: str, place: Place) -> Chunk:
    content = np.frombuffer((kit / place[0]).read_bytes(), np.uint8)
    return Chunk(digest, (Piece(place, len(content), content[place[1] : place[1] + 100_000]),))


def bring(shelf: Shelf, kit: Path, digest: str, messages: int = 100) -> None:
    for _ in range(messages):
        if not (place := shelf.lacks(digest).place)[0]:
            return
        shelf.put(read(kit, digest, place))
