"""tools/gpu_check.py, as far as it goes without a GPU."""

import csv
import json
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import gpu_check
from gpu_check import Part

sys.path.pop(0)

INFO = {"device": "NVIDIA <Test>", "driver": "1.2"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_what_is_missing():
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_check.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "GPU              MISSING" in result.stdout
    assert "nothing was run" in result.stdout.splitlines()[-1]


def test_a_command_that_hangs_is_ended(tmp_path):
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; subprocess.run({sleep})"
    began = time.monotonic()
    assert gpu_check.run([sys.executable, "-c", code], 1, tmp_path / "log") is None
    assert time.monotonic() - began < 30


def test_report(tmp_path):
    columns = ["case", "side", "op", "dtype", "elements", "role", "p50", "unit", "share_of_floor"]
    with (tmp_path / "bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "bar", "met"])
        writer.writerow(
            ["c", "s", "forward", "bfloat16", 64, "ours", 1, "s", 0.95, ">= 0.92", "True"]
        )
    parts = [
        Part("build", "pass", ""),
        Part("memcheck", "not run", "compute-sanitizer was not found"),
        Part("benchmark", "pass", "1 figure", figures={"figures": 1}),
    ]
    gpu_check.report(tmp_path, INFO, parts, 12.0)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["machine"] == INFO and len(content["figures"]) == 1
    assert [part["status"] for part in content["parts"]] == ["pass", "not run", "pass"]
    rows = list(csv.DictReader((tmp_path / "report.csv").open(newline="")))
    assert rows[1]["detail"] == "compute-sanitizer was not found"
    text = (tmp_path / "report.md").read_text()
    assert "| memcheck | not run |" in text and "| c | s | 1 s | >= 0.92 | yes |" in text
    picture = (tmp_path / "floor.svg").read_text()
    assert "forward bfloat16 64" in picture and "0.95" in picture and "&lt;Test&gt;" in picture


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "workload: done\n========= ERROR SUMMARY: 0 errors", "pass"),
        (1, "workload: done\n========= ERROR SUMMARY: 3 errors", "fail"),
        (
            1,
            "========= Invalid __global__ read of size 16\n========= ERROR SUMMARY: 1 error",
            "fail",
        ),
        (1, "========= Error: device not supported", "not run"),
        (None, "", "not run"),
    ],
)
def test_compute_sanitizer(monkeypatch, tmp_path, status, output, expected):
    def run(command, seconds, log, **env):
        sanitized = "--tool" in command
        log.write_text(output if sanitized else "workload: done\n")
        return status if sanitized else 0

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_program", lambda *names: "compute-sanitizer")
    assert gpu_check.sanitize("memcheck", tmp_path, 10).status == expected
    monkeypatch.setattr(gpu_check, "find_program", lambda *names: None)
    assert gpu_check.sanitize("memcheck", tmp_path, 10).status == "not run"


def test_a_workload_that_crashes_is_a_failure(monkeypatch, tmp_path):
    def run(command, seconds, log, **env):
        log.write_text("Traceback")
        return 1

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_program", lambda *names: "compute-sanitizer")
    assert gpu_check.sanitize("memcheck", tmp_path, 10).status == "fail"


def test_tests_without_their_packages_are_left_out(monkeypatch):
    assert "test_cuda_gpu.py" not in gpu_check.unavailable_tests()
    find_spec = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util,
        "find_spec",
        lambda name: None if name == "hypothesis" else find_spec(name),
    )
    left_out = gpu_check.unavailable_tests()
    assert left_out and set(left_out.values()) == {"hypothesis"}
    assert "test_cuda_gpu.py" not in left_out
