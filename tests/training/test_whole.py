"""Files that appear all at once or not at all."""

import pytest

from fedpeft.training.whole import whole


def test_files_appear_when_all_are_there_and_replace_those_of_their_names(tmp_path):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    (out / "kept").write_text("old")
    (out / "a").write_text("old")
    (out / "folder").mkdir()
    (out / "folder" / "old").write_text("old")
    with whole(out) as scratch:
        (scratch / "a").write_text("new")
        (scratch / "folder").mkdir()
        (scratch / "folder" / "b").write_text("new")
        assert (out / "a").read_text() == "old"
        assert scratch.parent == out.parent  # on the same disk
    assert {str(x.relative_to(out)): x.is_dir() or x.read_text() for x in out.rglob("*")} == {
        "kept": "old",
        "a": "new",
        "folder": True,
        "folder/b": "new",
    }
    assert [x.name for x in out.parent.iterdir()] == ["out"]


def test_nothing_is_left_of_what_went_wrong(tmp_path):
    def fail(folder):
        with whole(folder) as scratch:
            (scratch / "a").write_text("half")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail(tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def test_a_folder_is_made_with_the_rights_of_any_other(tmp_path):
    with whole(tmp_path / "new") as scratch:
        (scratch / "a").write_text("x")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
