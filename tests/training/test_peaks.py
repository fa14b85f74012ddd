"""The peak of a process is what the kernel counted, whichever process it is."""

import json
import multiprocessing
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fedpeft.training import peaks


def test_a_peak_stays_when_the_memory_has_been_given_back_and_is_not_that_of_the_process_before():
    code = (
        "import json; from fedpeft.training.peaks import peak\n"
        "before = peak(); x = bytearray(b'x') * 50_000_000; del x; print(json.dumps([before, peak()]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert 49_000_000 < after - before < 60_000_000  # the kernel counts pages in lots, within a percent
    if sys.platform == "linux":
        assert after < resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + 60_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells it of other processes")
def test_the_peaks_of_worker_processes_are_told_while_they_are_there():
    here = multiprocessing.get_context("fork")
    gate = here.Event()
    some = [here.Process(target=gate.wait) for _ in range(2)]
    for x in some:
        x.start()
    known = peaks.workers()
    assert len(known) == 2
    assert min(known) > 1_000_000
    gate.set()
    for x in some:
        x.join()
    assert peaks.workers() == []
    assert peaks.peak_of(some[0].pid) is None


def test_where_there_is_no_proc_it_is_what_getrusage_says_in_the_systems_unit(monkeypatch):
    monkeypatch.setattr(peaks, "peak_of", lambda process: None)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3000))
    for unit in (1, 1024):
        monkeypatch.setattr(peaks, "_UNIT", unit)
        assert peaks.peak() == 3000 * unit
    assert peaks.workers() == []


def test_a_gpus_peak_is_of_all_gpus_that_torch_uses_and_none_where_it_uses_none(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert peaks.gpu_peak() is None
    for begun, want in ((False, None), (True, 70)):
        cuda = SimpleNamespace(
            is_initialized=lambda begun=begun: begun, device_count=lambda: 2, max_memory_allocated=lambda n: 30 + 10 * n
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        assert peaks.gpu_peak() == want
