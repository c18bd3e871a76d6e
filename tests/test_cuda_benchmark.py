"""benchmarks/gpu.py and how its figures are kept, as far as that goes without a GPU."""

import csv
import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command
from benchmarks import cases, gpu, record, timing


def fails(*args):
    raise RuntimeError("no compiler for it")


@pytest.fixture
def section(monkeypatch):
    """Runs the section on the CPU, with a stand-in for the peer and for what takes the times."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    namespace = timing.namespace
    monkeypatch.setattr(timing, "namespace", lambda case, side, device: namespace(case, side))
    for name in ("check", "independence", "memory", "host"):
        monkeypatch.setattr(gpu, name, lambda *args: None)
    small = [case for case in gpu.device_cases(quick=True) if case.elements == 4 * cases.Ki]
    assert len(small) > 1 and all(gpu.TRITON in case.sides for case in small)
    monkeypatch.setattr(gpu, "device_cases", lambda quick: small)

    def run(check=lambda dtype: None, dropout=lambda x, p: x * 1, broken=None):
        """(case, side) of all times, notes and whether it failed."""
        peer = types.ModuleType("benchmarks.triton_dropout")
        peer.check, peer.dropout = check, dropout
        monkeypatch.setitem(sys.modules, peer.__name__, peer)
        monkeypatch.setattr(sys.modules["benchmarks"], "triton_dropout", peer, raising=False)
        timed = []

        def device_seconds(functions, rounds, calls):
            timed.append(functions)
            return fails() if len(timed) - 1 == broken else np.ones((rounds, len(functions)))

        monkeypatch.setattr(gpu, "device_seconds", device_seconds)
        found, failed = [], False
        try:
            gpu.run(found.append, True, "cuda")
        except RuntimeError:
            failed = True
        rows = [message["row"] for message in found if "row" in message]
        times = {(row["case"], row["side"]) for row in rows if row["metric"] == "time"}
        return times, [message["note"] for message in found if "note" in message], failed

    run.cases = small
    return run


def test_a_peer_that_fails_is_a_note(section):
    everything, notes, failed = section()
    assert not notes and not failed
    expected = {(case, side) for case, side in everything if side != gpu.TRITON.name}
    assert expected < everything
    for kwargs in ({"check": fails}, {"dropout": fails}):
        times, notes, failed = section(**kwargs)
        assert times == expected and not failed
        assert notes and all(gpu.TRITON.name in note and "no compiler" in note for note in notes)
    # One that is known not to work is not tried again.
    assert len(section(check=fails, dropout=fails)[1]) == 1


def test_a_case_that_fails_leaves_the_others(section):
    everything = section()[0]
    times, notes, failed = section(broken=1)
    broken = str(section.cases[1])
    assert times == {(case, side) for case, side in everything if case != broken}
    assert failed and len(notes) == 1 and broken in notes[0] and "no compiler" in notes[0]


class Events:
    """Stands in for torch.cuda: a call takes 2 ms, and 1000 cycles of sleep cover one."""

    def __init__(self, monkeypatch):
        self.calls, self.asleep = 0, 0
        properties = types.SimpleNamespace(L2_cache_size=2**20)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: self)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda n, device: torch.empty(8))

    def sleep(self, cycles):
        self.asleep, self.calls = cycles, 0

    def record(self):
        pass

    def query(self):
        return self.asleep < 1000 * self.calls

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 2.0 * self.calls

    def call(self):
        self.calls += 1


@pytest.mark.parametrize("n", [1, 50])
def test_batches_of_calls(n, monkeypatch):
    events = Events(monkeypatch)
    monkeypatch.setattr(gpu, "ASLEEP", 600)
    seconds = gpu.device_seconds([events.call, events.call], 3, n)
    np.testing.assert_allclose(seconds, 2e-3)
    assert events.calls == n
    # Asleep for as long as it takes to enqueue the calls, and no longer than need be.
    assert 1000 * n <= events.asleep <= 2000 * n
    # Where nothing helps there is an end.
    monkeypatch.setattr(events, "query", lambda: True)
    np.testing.assert_allclose(gpu.device_seconds([events.call], 1, n), 2e-3)


def test_the_cache_is_flushed_without_writing():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            written = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
            seen.append((written, args[0]))
            return func(*args, **(kwargs or {}))

    seen = []
    buffer = torch.zeros(100)
    with Watch():
        gpu.evict(buffer)
    assert any(tensor is buffer for _, tensor in seen)
    assert not any(written for written, _ in seen)


def test_figures_are_kept_as_they_come(monkeypatch):
    messages = [
        {"section": "gpu", "total": 2},
        {"row": {"a": 1}},
        {"step": "one"},
        {"row": {"a": 2}},
    ]
    lines = "\n".join(map(json.dumps, messages))
    code = f"import os; print({lines!r}, flush=True); os.kill(os.getpid(), 9)"
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **kwargs: start([sys.executable, "-c", code], **kwargs),
    )
    args = types.SimpleNamespace(quick=True)
    rows, saved = [], []
    notes, succeeded = command.run_worker(
        "default", True, ["gpu"], args, command.NoProgress(), 60, rows.append,
        lambda: saved.append(len(rows)),
    )  # fmt: skip
    assert saved == [1] and rows == [{"a": 1}, {"a": 2}]
    assert not succeeded
    assert "FAILED, status -9" in notes[0] and "last in gpu" in notes[0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results" / "bench.csv"
    record.write([{"case": "a"}], path)

    def rows():
        yield {"case": "b"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record.write(rows(), path)
    with path.open(newline="") as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_section_that_fails_leaves_those_after_it():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.worker", "gpu", "statistics", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and "Error" in result.stderr
    rows = [json.loads(line).get("row") for line in result.stdout.splitlines()]
    assert {row["section"] for row in rows if row} == {"statistics"}
