"""The process's surroundings are set in time, and facts on them are to be had."""

import gc
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest

from fedpeft.training import environment, machine


@pytest.fixture
def clean(monkeypatch):
    for name, _ in environment._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, _, _ in environment._ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_settings_reach_processes_that_are_started(clean):
    environment.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert int(os.environ["MALLOC_TRIM_THRESHOLD_"]) == 1 << 30
    assert int(os.environ["MALLOC_MMAP_THRESHOLD_"]) == 8 << 20


def test_what_the_user_has_set_stays(clean):
    clean.setenv("OMP_WAIT_POLICY", "ACTIVE")
    clean.setenv("MALLOC_TOP_PAD_", "4096")
    environment.prepare()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["MALLOC_TOP_PAD_"] == "4096"


def test_settings_that_come_after_torch_are_said_to_be_late(clean):
    clean.setitem(sys.modules, "torch", object())
    assert not environment.prepare()
    clean.delitem(sys.modules, "torch")
    clean.delenv("OMP_WAIT_POLICY")
    assert environment.prepare()


def test_a_number_of_threads_is_given_to_torch_when_it_is_imported_and_when_it_will_be(clean):
    seen = []
    clean.setitem(sys.modules, "torch", type("Torch", (), {"set_num_threads": staticmethod(seen.append)}))
    clean.setenv("OMP_NUM_THREADS", "7")
    environment.prepare(threads=3)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert seen == [3]


def test_settings_environment_memory_and_names_of_models_import_no_torch():
    code = (
        "import sys\n"
        "import fedpeft.training.environment, fedpeft.training.settings, fedpeft.training.memory\n"
        "from fedpeft.training.packaged import presence\n"
        "from fedpeft.training.machine import models\n"
        "models()\n"
        "print([x for x in ('torch', 'transformers', 'peft') if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPEFT_CACHE", str(tmp_path))
    assert environment.cache_folder() == tmp_path
    monkeypatch.setenv("FEDPEFT_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / ".cache" / "fedpeft"


def test_facts_say_what_the_machine_has_and_how_fast_it_multiplies():
    found = json.loads(json.dumps(machine.facts()))
    assert found["cores"] >= 1
    assert 0 < found["memory"]["available"] <= found["memory"]["total"]
    assert found["precision"] in ("fp32", "bf16")
    assert found["gflops"]["fp32"] > 0
    assert found["gflops"]["bf16"] > 0
    assert found["versions"]["torch"].startswith("2.")


def test_the_models_of_the_packages_are_ready():
    assert {name: text.split()[0] for name, text in machine.models().items()} == {
        "minilm": "ready",
        "smollm2": "ready",
        "dinov2-small": "ready",
    }


STARTING = """
import gc, json, sys
from fedpeft.training.environment import starting
said = []
try:
    with starting():
        said.append(gc.isenabled())
        if sys.argv[1] == "error":
            raise KeyError
except KeyError:
    pass
said += [gc.isenabled(), gc.get_freeze_count() > 10_000]
gc.unfreeze()
sys.modules["torch"] = None
with starting():
    said.append(gc.isenabled())
said.append(gc.get_freeze_count() > 10_000)
del sys.modules["torch"]
gc.disable()
with starting():
    pass
said.append(gc.isenabled())
print(json.dumps(said))
"""


@pytest.mark.parametrize("way", ["plain", "error"])
def test_the_collector_rests_while_torch_is_imported_and_not_later(way):
    done = subprocess.run([sys.executable, "-c", STARTING, way], capture_output=True, text=True, check=True)
    off, on_again, frozen, on_later, frozen_later, as_the_user_has_it = json.loads(done.stdout)
    assert (off, on_again, frozen) == (False, True, True)
    assert (on_later, frozen_later) == (True, False), "once torch is there, models would be kept for good"
    assert as_the_user_has_it is False


def test_a_sparing_process_imports_nothing_that_is_not_needed_and_finds_it_later(clean):
    code = (
        "import sys\nfrom fedpeft.training import environment\nenvironment.sparing()\n"
        "environment._UNUSED = ('colorsys', 'json')\nimport json\n"
        "with environment.starting():\n"
        "    try:\n        import colorsys\n    except ImportError:\n        print('absent')\n"
        "    import json\n"
        "import colorsys, gc\nprint(gc.isenabled(), gc.get_freeze_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["absent", "True", "0"]


@pytest.mark.parametrize("has_torch", [False, True])
def test_what_peft_must_not_find_is_hidden_in_every_process_and_it_settles_that_for_good(clean, has_torch):
    said = []

    def question() -> None:
        said.append(sys.modules["colorsys"])

    clean.setattr(environment, "_NOT_THEIRS", ("colorsys",))
    clean.delitem(sys.modules, "colorsys", raising=False)
    asked = type("Asked", (), dict.fromkeys(("is_bnb_available", "is_bnb_4bit_available"), staticmethod(question)))
    clean.setitem(sys.modules, "peft.import_utils", asked)
    asked = type("Asked", (), {"is_bitsandbytes_available": staticmethod(question)})
    clean.setitem(sys.modules, "transformers.utils.import_utils", asked)
    clean.setitem(sys.modules, "torch", object()) if has_torch else clean.delitem(sys.modules, "torch", raising=False)
    clean.setattr(gc, "isenabled", lambda: False)
    with environment.starting(), pytest.raises(ImportError):
        import_module("colorsys")
    assert said == [None] * 3
    assert "colorsys" not in sys.modules
    assert import_module("colorsys").rgb_to_hls


def test_a_version_of_peft_or_transformers_that_has_no_such_question_is_not_asked(clean):
    for name in ("peft.import_utils", "transformers.utils.import_utils"):
        clean.setitem(sys.modules, name, type("Other", (), {}))
    clean.setattr(environment, "_NOT_THEIRS", ("colorsys",))
    clean.delitem(sys.modules, "colorsys", raising=False)
    with environment.starting():
        pass
    assert import_module("colorsys").rgb_to_hls


def test_what_is_hidden_is_there_for_who_asks_for_it_and_stays_then(clean):
    clean.delitem(sys.modules, "colorsys", raising=False)
    with environment.without(["colorsys"]):
        with environment.showing("colorsys"):
            pass
        with pytest.raises(ImportError):
            import_module("colorsys")
        with environment.showing("colorsys"):
            found = import_module("colorsys")
        assert import_module("colorsys") is found
    assert sys.modules["colorsys"] is found
    with environment.showing("colorsys"):
        assert import_module("colorsys") is found
