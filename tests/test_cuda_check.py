"""tools/gpu_check.py, as far as it goes without a GPU."""

import csv
import json
import subprocess
import sys
import sysconfig
import time

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import gpu_check
from gpu_check import Part

sys.path.pop(0)

INFO = {"device": "NVIDIA <Test>", "driver": "1.2", "commit": "abc1234"}
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_says_what_is_missing():
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "gpu_check.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "GPU               MISSING" in result.stdout
    assert "nothing was run" in result.stdout.splitlines()[-1]


def test_only_what_the_parts_need_is_demanded(tmp_path):
    assert set(gpu_check.requirements(["benchmark"])) == {"torch with CUDA", "GPU", "numpy"}
    assert "nvcc" in gpu_check.requirements(["build", "tests"])
    assert "nvcc" not in gpu_check.requirements(["build", "tests"], tmp_path)


def test_a_command_that_hangs_is_ended(tmp_path):
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)']"
    code = f"import subprocess, sys; subprocess.run({sleep})"
    began = time.monotonic()
    assert gpu_check.run([sys.executable, "-c", code], 1, tmp_path / "log") is None
    assert time.monotonic() - began < 30


def test_no_test_of_ours_is_left_out_as_it_is_run(tmp_path):
    """A script finds modules in its own folder and not in the current one, unlike pytest."""
    code = "import sys; sys.path[0] = sys.argv[1]; import gpu_check, json\n"
    code += "print(json.dumps(gpu_check.unavailable_tests()))"
    output = subprocess.run(
        [sys.executable, "-c", code, ROOT / "tools"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ours = {path.name for path in ROOT.iterdir()} | {"family", "helpers", "gpu_check"}
    assert not ours & set(json.loads(output).values())


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


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs the command with stand-ins for what needs a GPU: part name = status, log and detail."""
    monkeypatch.setattr(gpu_check, "requirements", lambda *args: {})
    info = dict(INFO)
    monkeypatch.setattr(gpu_check, "machine", lambda: dict(info))
    works = Part("build", "pass", "")
    monkeypatch.setattr(gpu_check, "self_check", lambda log, what="": works)

    def command(*arguments, commit=INFO["commit"], extension="pass", **parts):
        info["commit"] = commit
        works.status = extension

        def stand_in(name):
            def part(log, seconds, built=None):
                status, text = parts[name]
                log.write_text(text)
                if name == "benchmark":
                    write_figures(tmp_path)
                return Part(name, status, f"about {name}")

            return part

        monkeypatch.setattr(
            gpu_check, "PARTS", {name: (stand_in(name), 400) for name in gpu_check.PARTS}
        )
        monkeypatch.setattr(gpu_check, "build", stand_in("build"))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
        return gpu_check.main()

    return command


def write_figures(folder):
    columns = ["case", "side", "op", "dtype", "elements", "role", "p50", "unit", "share_of_floor"]
    with (folder / "bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "bar", "met"])
        writer.writerow(
            ["c", "s", "forward", "bfloat16", 64, "ours", 1, "s", 0.95, ">= 0.92", "True"]
        )


def statuses(folder):
    content = json.loads((folder / "report.json").read_text())
    return {part["name"]: part["status"] for part in content["parts"]}


def test_report(check, tmp_path):
    assert check(build=("pass", ""), tests=("pass", ""), sanitizer=("not run", ""),
                 benchmark=("pass", "")) == 0  # fmt: skip
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.json", "report.md", "bench.csv"}
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["machine"] == INFO
    assert list(statuses(tmp_path).values()) == ["pass", "pass", "not run", "pass"]
    text = (tmp_path / "report.md").read_text()
    assert "| sanitizer | not run |" in text and "| c | s | 1 s | >= 0.92 | yes |" in text
    assert "about sanitizer" in text


def test_whole_logs_of_what_failed(check, monkeypatch, tmp_path):
    """Within seven files of 16 MiB, all in one folder, whatever fails."""
    log = "".join(f"line {i}\n" for i in range(1000))
    parts = dict.fromkeys(("tests", "sanitizer", "benchmark"), ("fail", log))
    assert check(build=("fail", log), **parts) == 1
    files = list(tmp_path.iterdir())
    assert all(path.is_file() for path in files) and len(files) == 7
    for name in (*parts, "build"):
        assert (tmp_path / f"{name}.log").read_text() == log
    assert gpu_check.MAX_FILE_BYTES == 16 * 2**20
    monkeypatch.setattr(gpu_check, "MAX_FILE_BYTES", 5000)
    assert check("--only", "tests", tests=("fail", log)) == 1
    text = (tmp_path / "tests.log").read_text()
    assert len(text) <= 5000
    assert text.startswith("line 0\nline 1\n") and text.endswith("line 998\nline 999\n")
    assert check("--only", "tests", tests=("pass", log)) == 0
    assert not (tmp_path / "tests.log").exists()


def test_one_command_for_each_part(check, tmp_path):
    assert check("--only", "build", build=("pass", "")) == 0
    assert check("--only", "tests", tests=("fail", "")) == 1
    # The report of a clean tree makes it dirty where reports are committed.
    dirty = INFO["commit"] + "-dirty"
    assert check("--only", "benchmark", benchmark=("pass", ""), commit=dirty) == 0
    assert statuses(tmp_path) == {"build": "pass", "tests": "fail", "benchmark": "pass"}
    assert check("--only", "tests", tests=("pass", ""), commit=dirty) == 0
    assert statuses(tmp_path) == {"build": "pass", "tests": "pass", "benchmark": "pass"}
    assert check("--only", "tests", tests=("pass", ""), commit="fffffff") == 0
    assert statuses(tmp_path) == {"tests": "pass"}
    # Ten minutes are all that some machines give a command.
    assert all(seconds <= 480 for _, seconds in gpu_check.PARTS.values())


def test_nothing_runs_without_an_extension_that_works(check, tmp_path):
    assert check(build=("fail", ""), extension="fail") == 1
    assert list(statuses(tmp_path).values()) == ["fail", "not run", "not run", "not run"]


@pytest.fixture
def root(monkeypatch, tmp_path):
    (tmp_path / "dropout_ext").mkdir()
    (tmp_path / "dropout_ext" / f"_C{SUFFIX}").write_text("stale")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "self_check", lambda log, what="": Part("build", "pass", what))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return tmp_path


def test_warnings_are_errors(root, monkeypatch):
    seen = []

    def run(command, seconds, log, **env):
        seen.append(env)
        log.write_text("x.cu(3): warning")
        return 1 if env["DROPOUT_EXT_WERROR"] == "1" else 0

    monkeypatch.setattr(gpu_check, "run", run)
    part = gpu_check.build(root / "log", 100)
    # Reported as a failure, and built all the same for what comes after.
    assert part.status == "fail" and "x.cu(3): warning" in part.detail
    assert [env["DROPOUT_EXT_WERROR"] for env in seen] == ["1", "0"]
    assert {env["TORCH_CUDA_ARCH_LIST"] for env in seen} == {"9.0"}
    monkeypatch.setattr(gpu_check, "run", lambda command, seconds, log, **env: 0)
    assert gpu_check.build(root / "log", 100).status == "pass"


def test_a_build_that_fails_leaves_no_stale_extension(root, monkeypatch):
    def run(command, seconds, log, **env):
        log.write_text("error")
        return 1

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.build(root / "log", 100).status == "fail"
    assert not list((root / "dropout_ext").iterdir())


def test_an_extension_built_elsewhere(root):
    built = root / f"_C{SUFFIX}"
    built.write_text("carried")
    assert gpu_check.build(root / "log", 100, built).status == "pass"
    assert (root / "dropout_ext" / f"_C{SUFFIX}").read_text() == "carried"
    in_place = root / "dropout_ext" / f"_C{SUFFIX}"
    assert gpu_check.build(root / "log", 100, in_place).status == "pass"
    assert in_place.read_text() == "carried"
    other = root / "_C.cpython-38-riscv64-linux-gnu.so"
    other.write_text("")
    part = gpu_check.build(root / "log", 100, other)
    assert part.status == "fail" and SUFFIX in part.detail
    assert (root / "dropout_ext" / f"_C{SUFFIX}").read_text() == "carried"


def test_an_extension_without_cuda_is_none(monkeypatch, tmp_path):
    def self_check(printed):
        def run(command, seconds, log, **env):
            log.write_text(printed)
            return 0

        monkeypatch.setattr(gpu_check, "run", run)
        return gpu_check.self_check(tmp_path / "log").status

    assert self_check("CUDA: no\nok     dropout, p=0.5, cpu") == "fail"
    assert self_check("ok     dropout, p=0.5, cuda:0") == "pass"


OURS = "void dropout_ext::cuda::<unnamed>::flat_kernel<float, (bool)1>(T1)+0x1d0"
TORCHS = "void at::native::vectorized_elementwise_kernel<(int)4, T1>(int, T2, T3)+0x40"
API_ERROR = """\
========= Program hit cudaErrorInvalidValue (error 1) due to "invalid argument" on CUDA API call
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: dropout_ext::cuda::apply(dropout_ext::ApplyArgs const&) in _C.so
"""


def uninitialized(where):
    return f"""\
========= Uninitialized __global__ memory read of size 4 bytes
=========     at {where}
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7fd2f5a00000
"""


RACE = f"""\
========= Error: Race reported between Read access at {OURS}
=========     and Write access at {OURS} [32 hazards]
"""


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("workload: done\n========= ERROR SUMMARY: 0 errors", "pass"),
        (uninitialized(OURS) + "workload: done\n========= ERROR SUMMARY: 1 error", "fail"),
        # An error that ends the workload.
        (uninitialized(OURS) + "Traceback\n========= ERROR SUMMARY: 1 error", "fail"),
        (uninitialized(TORCHS) + "workload: done\n========= ERROR SUMMARY: 1 error", "pass"),
        (API_ERROR + "workload: done\n========= ERROR SUMMARY: 1 error", "pass"),
        (
            API_ERROR + uninitialized(TORCHS) + uninitialized(OURS) + "workload: done\n"
            "========= ERROR SUMMARY: 3 errors",
            "fail",
        ),
        (RACE + "workload: done\n========= RACECHECK SUMMARY: 1 hazard displayed", "fail"),
        ("workload: done\n========= RACECHECK SUMMARY: 0 hazards displayed", "pass"),
        ("========= Error: device not supported", "not run"),
        ("workload: done\n", "not run"),
        ("", "not run"),
    ],
)
def test_what_compute_sanitizer_says(output, expected):
    assert gpu_check.judge(output)[0] == expected


def test_compute_sanitizer(monkeypatch, tmp_path):
    log = tmp_path / "log"
    tools = []

    def run(command, seconds, log, **env):
        text = "workload: done\n"
        if "--tool" in command:
            tools.append(command[command.index("--tool") + 1])
            text += "========= ERROR SUMMARY: 0 errors\n"
            if tools[-1] == "synccheck":
                text += uninitialized(OURS)
        with log.open("a") as file:
            file.write(text)
        return 0

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    part = gpu_check.sanitizer(log, 100)
    # One tool's report does not spoil the next one's.
    assert part.status == "fail" and list(part.figures.values()).count("fail") == 2
    assert set(tools) == {"memcheck", "synccheck", "initcheck", "racecheck"}
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    assert gpu_check.sanitizer(log, 10).status == "not run"


def test_a_workload_that_crashes_is_a_failure(monkeypatch, tmp_path):
    def run(command, seconds, log, **env):
        log.write_text("Traceback")
        return 1

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    part = gpu_check.sanitizer(tmp_path / "log", 10)
    assert part.status == "fail" and "Traceback" in part.detail
