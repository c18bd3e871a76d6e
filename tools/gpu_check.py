"""Everything that needs a GPU: build, tests, compute-sanitizer, benchmark. Needs what is installed
there (a CUDA torch, nvcc, ninja, pybind11, pytest) and no network.

    python tools/gpu_check.py [--only build,tests,sanitizer,benchmark] [--out FOLDER]
                              [--built FILE]

Each part ends within eight minutes, so where a command may take no more than ten, run one part per
command, `--only build` first: they add to one report. `--built` takes an extension that was built
elsewhere for this Python and torch instead of building one (docs/cuda.md says how).

The report in benchmarks/results/<device> is at most seven files of at most 16 MiB: report.md, to be
read; report.json, by which a later command adds to it; bench.csv; and of each part that failed its
whole log. Logs and bench.csv are there while a part runs. A part that the machine cannot run is
reported as not run, with the reason, and the rest goes on. Exit status: 0 if nothing failed, 1 if
something did, 2 if the machine lacks what the parts need.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_BYTES = 16 * 2**20
WORKLOAD_DONE = "workload: done"


@dataclass
class Part:
    name: str
    status: str  # pass, fail, not run
    detail: str
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)


def find_program(name: str, *subfolders: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        for subfolder in ("bin", *subfolders):
            path = Path(home) / subfolder / name
            if path.exists():
                return str(path)
    return shutil.which(name)


def find_sanitizer() -> str | None:
    return find_program("compute-sanitizer", "compute-sanitizer", "extras/compute-sanitizer")


def requirements(names: list[str], built: Path | None = None) -> dict[str, str]:
    """What these parts need, and what was found; empty where it is missing."""
    found = {}
    try:
        import torch

        found["torch with CUDA"] = torch.__version__ if torch.version.cuda else ""
        gpu = torch.cuda.is_available()
        found["GPU"] = torch.cuda.get_device_name() if gpu else ""
    except ImportError:
        found["torch with CUDA"] = found["GPU"] = ""
    packages = []
    if "build" in names and built is None:
        found["nvcc"] = find_program("nvcc") or ""
        found["C++ compiler"] = shutil.which(os.environ.get("CXX", "c++")) or ""
        packages += ["ninja", "pybind11"]
    if "tests" in names:
        packages.append("pytest")
    if "benchmark" in names:
        packages.append("numpy")
    for package in packages:
        module = importlib.util.find_spec(package)
        # The pybind11 that torch brings along serves as well.
        found[package] = version(package) if module else "with torch" * (package == "pybind11")
    if found.get("ninja") == "":
        found["ninja"] = shutil.which("ninja") or ""
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "found"


def run(command: list[str], seconds: float, log: Path, **env: str) -> int | None:
    """Exit status, None for a command that took too long and was ended with its children. What it
    prints is added to `log`."""
    with log.open("a") as output:
        print("$", *command, file=output, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(1, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def cut(log: Path) -> None:
    """Leaves both ends of a log that is too large for the report."""
    half = MAX_FILE_BYTES // 2 - 100
    if (size := log.stat().st_size) <= MAX_FILE_BYTES:
        return
    with log.open("rb") as file:
        head = file.read(half)
        file.seek(size - half)
        tail = file.read()
    log.write_bytes(head + f"\n[{size - 2 * half} bytes left out]\n".encode() + tail)


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def outcome(name: str, status: int | None, log: Path) -> Part:
    if status == 0:
        return Part(name, "pass", "")
    what = "took too long" if status is None else f"exit status {status}"
    return Part(name, "fail", f"{what}; the end of {log.name}:\n{tail(log)}")


def self_check(log: Path, what: str = "") -> Part:
    """Whether the extension in dropout_ext/ works on the GPU."""
    part = outcome("build", run([sys.executable, "-m", "dropout_ext"], 120, log), log)
    if part.status == "pass" and "cuda:0" not in log.read_text(errors="replace"):
        part = Part("build", "fail", f"the extension was built without CUDA\n{tail(log)}")
    part.detail = part.detail or f"{what}, self-check passed"
    return part


def build(log: Path, seconds: float, built: Path | None = None) -> Part:
    import torch

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if built is not None and not built.name.endswith(suffix):
        return Part("build", "fail", f"{built} is not for this Python, which loads *{suffix}")
    carried = built.read_bytes() if built is not None else b""  # it may be one of the stale ones
    for stale in (ROOT / "dropout_ext").glob("_C*.so"):
        stale.unlink()
    if built is not None:
        (ROOT / "dropout_ext" / f"_C{suffix}").write_bytes(carried)
        return self_check(log, f"{built.name}, built elsewhere")
    arch = "{}.{}".format(*torch.cuda.get_device_capability())
    env = {"TORCH_CUDA_ARCH_LIST": arch, "DROPOUT_EXT_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    began = time.monotonic()
    status = run(command, seconds, log, DROPOUT_EXT_WERROR="1", **env)
    if status == 0:
        return self_check(log, f"for sm_{arch.replace('.', '')}")
    part = outcome("build", status, log)
    # A compiler that warns of more than those at hand is a fault, but no reason to lose the rest.
    left = seconds - (time.monotonic() - began)
    if run(command, left, log, DROPOUT_EXT_WERROR="0", **env) == 0:
        part.detail = f"warnings are errors; without that it builds, and is used\n{part.detail}"
    return part


def unavailable_tests() -> dict[str, str]:
    """Test files that import, at their top, a package that is not installed."""
    # What pytest finds: it runs from the root, and puts the folder of a test on the path.
    folders = (ROOT, ROOT / "tests", ROOT / "tools")
    missing = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in (name.split(".")[0] for name in names):
                ours = any(
                    (folder / f"{name}.py").exists() or any((folder / name).glob("*.py"))
                    for folder in folders
                )
                if not ours and importlib.util.find_spec(name) is None:
                    missing[path.name] = name
    return missing


def tests(log: Path, seconds: float) -> Part:
    left_out = unavailable_tests()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "cuda", "-v", "-p", "no:cacheprovider"]
        command += ["--tb=short", "--durations=10", f"--junitxml={junit}"]
        command += [f"--ignore=tests/{name}" for name in left_out]
        part = outcome("tests", run(command, seconds, log), log)
        suite = ElementTree.parse(junit).getroot().find("testsuite") if junit.exists() else None
    if suite is not None:
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        part.figures = counts
        failed = counts["failures"] + counts["errors"]
        ran = counts["tests"] - counts["skipped"]
        summary = f"{ran - failed} passed, {failed} failed, {counts['skipped']} skipped"
        skips = {case.find("skipped").get("message") for case in suite.iter("testcase")
                 if case.find("skipped") is not None}  # fmt: skip
        notes = [summary, *(f"skipped: {reason}" for reason in sorted(filter(None, skips)))]
        part.detail = "\n".join([*notes, part.detail]).strip()
        if ran == 0:
            part.status = "fail"
    for name, package in left_out.items():
        part.detail += f"\nnot run: tests/{name} ({package} is not installed)"
    return part


def every_kernel(device: str) -> Iterator[tuple[str, Tensor]]:
    """Calls that reach every kernel, with ends within and beyond a vector, and those results whose
    bits are the same on every device."""
    import torch

    import dropout_ext
    from dropout_ext import _C, _reference, dropout, dropout_add, keep_mask

    ops = torch.ops.dropout_ext
    key = dropout_ext.key(42)
    on_gpu = device != "cpu"
    # Rows that begin at a vector and rows that do not, and columns, of a mask of (19, 1000).
    masks = {"flat": None, "rows": (1000, 1), "columns": (1, 19)}
    sizes = {"flat": (1, 9, 1025, 5003), "rows": (19 * 64, 19 * 61), "columns": (19 * 64, 19 * 61)}

    def tensors(dtype):
        real = dtype.to_real() if dtype.is_complex else dtype
        values = (torch.arange(2 * 5003 + 8, device=device) % 251 - 125).to(real) / 8
        for path, strides in masks.items():
            for size in sizes[path]:
                for begin in (0, 1, 3):
                    pair = []
                    for source in (values, values.flip(0)):
                        # Through the storage, because views of complex tensors begin at whole
                        # elements.
                        storage = source.clone().untyped_storage()[begin * real.itemsize :]
                        x = torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (size,))
                        pair.append(x if path == "flat" else x.view(19, -1))
                    yield path, strides, begin, *pair

    for wide in (False, True):
        if on_gpu:
            _C._force_cuda_geometry(0, 0, wide)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16,
            torch.complex128, torch.complex64,
        ):  # fmt: skip
            for path, strides, begin, x, other in tensors(dtype):
                what = f"{path}, {dtype}, {tuple(x.shape)} from {begin}, wide {wide}"
                yield what, dropout(x, 0.5, key=key, mask_strides=strides, mask_offset=8)
                mask = (key, 0.5, 2.0, strides or (), 8)
                if not dtype.is_complex:
                    added = dropout_add(x, other, key=key, mask_strides=strides, mask_offset=8)
                    yield f"added, {what}", added
                    if dtype != torch.float64:
                        yield f"GELU, {what}", ops.activation(x, 0, *mask)
                        yield f"its gradient, {what}", ops.activation_backward(other, x, 0, *mask)
                if path == "columns":
                    yield f"transposed {what}", dropout(x.t(), 0.5, key=key)
                    shared = dropout(x, 0.5, key=key, broadcast_dims=(1,), inplace=True)
                    # PyTorch's own code takes complex numbers to be aligned as a whole.
                    shared = torch.view_as_real(shared) if dtype.is_complex else shared
                    yield f"in place, one decision per row, {what}", shared
        for path, strides in masks.items():
            for size in sizes[path]:
                shape = (size,) if path == "flat" else (19, size // 19)
                for offset in (0, 3):
                    kwargs = {"device": device, "mask_strides": strides, "mask_offset": offset}
                    what = f"mask, {path}, {shape} from {offset}, wide {wide}"
                    yield what, keep_mask(shape, 0.5, key, **kwargs)
                    args = (key, 0.5, shape, strides or (), offset)
                    bits = ops.keep_bits(*args, device=device)
                    # Bytes on the CPU.
                    yield f"bits, {what}", bits if on_gpu else _reference.pack(bits)
    if on_gpu:
        _C._force_cuda_geometry(0, 0, False)
    x = torch.ones(300, 7, device=device)
    yield "keys per slice", dropout(x, 0.5, key=dropout_ext.split(key, 300))
    yield "alpha", dropout_ext.functional.alpha_dropout(x, 0.5, True, key=key)
    double, single, halves = torch.float64, torch.float32, (torch.float16, torch.bfloat16)
    pairs = [(double, double), (single, single)]
    for half in halves:
        pairs += [(half, half), (half, single), (single, half)]
    for dtype, sum_dtype in pairs:
        # Columns in vectors and not, and more of them than the threads of a row hold.
        for rows, columns in ((70, 61), (70, 64), (3, 17_003)):
            x = (torch.arange(rows * columns, device=device) % 251 - 125).to(dtype) / 8
            x = x.view(rows, columns).requires_grad_()
            compute = torch.promote_types(dtype, single)
            weight = torch.ones(columns, dtype=compute, device=device, requires_grad=True)
            z, total = dropout_ext.dropout_add_layer_norm(
                x, x.flip(0).to(sum_dtype), columns, weight, weight, p=0.5, key=key, return_sum=True
            )
            # A norm and its gradients add up in an order of the device's own. What grad() returns
            # may abort a process that ends soon after: a thread of PyTorch's is to let go of it.
            z.backward(z.detach())
            yield f"sum, {sum_dtype}, of {dtype}, {(rows, columns)}", total


def captured_draw() -> tuple[Tensor, Tensor]:
    """What a graph that draws its key computes in a replay, and what that key gives outside it."""
    import torch

    import dropout_ext

    x = torch.ones(300, 7, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dropout_ext.dropout(x, 0.5)
    torch.cuda.manual_seed(7)
    graph.replay()
    return y, dropout_ext.dropout(x, 0.5, key=dropout_ext.key(7))


def workload(name: str) -> None:
    import torch

    if name == "calls":
        for _ in every_kernel("cuda"):
            pass
    else:
        captured_draw()
    torch.cuda.synchronize()
    print(WORKLOAD_DONE)


# Without torch's caching allocator, so that an overrun leaves its allocation; but a graph's memory
# has to outlive its capture.
WORKLOADS = {"calls": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "graph": {}}
OUR_KERNELS = ("--kernel-name", "kernel_substring=dropout_ext")
# initcheck has to see PyTorch's kernels write what ours read.
SANITIZER_TOOLS = {
    "memcheck": ("--report-api-errors", "no", *OUR_KERNELS),
    "synccheck": OUR_KERNELS,
    "initcheck": ("--check-api-memory-access", "no"),
    "racecheck": OUR_KERNELS,
}


def judge(text: str) -> tuple[str, str]:
    """What a tool's output says of our kernels: pass, fail or not run, and why."""
    records = re.split(r"^=+ (?=\S)", text, flags=re.MULTILINE)[1:]
    found = [record for record in records if re.search(r"\bat .*dropout_ext", record)]
    if found:
        return "fail", f"{len(found)} reports, the first: {found[0].strip()}"
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if summary and WORKLOAD_DONE in text:
        return "pass", f"nothing in our kernels ({summary[1].strip()} in all)"
    last = "\n".join(text.splitlines()[-15:])
    return "not run", f"it does not work here; the end of its output:\n{last}"


def sanitizer(log: Path, seconds: float) -> Part:
    program = find_sanitizer()
    if program is None:
        return Part("sanitizer", "not run", "compute-sanitizer was not found")
    end = time.monotonic() + seconds
    runs = [(tool, name) for tool in SANITIZER_TOOLS for name in WORKLOADS]
    results = {}
    details = []
    for name, env in WORKLOADS.items():
        status = run(workload_command(name), seconds / 4, log, **env)
        if status != 0:  # without a tool, so it is the workload itself
            return outcome("sanitizer", status, log)
    for i, (tool, name) in enumerate(runs):
        before = log.stat().st_size
        command = [program, "--tool", tool, "--print-limit", "0", "--show-backtrace", "device"]
        command += [*SANITIZER_TOOLS[tool], *workload_command(name)]
        left = (end - time.monotonic()) / (len(runs) - i)
        status = run(command, left, log, **WORKLOADS[name])
        result, why = judge(log.read_bytes()[before:].decode(errors="replace"))
        if result == "not run" and status is None:
            why = "it took too long"
        results[f"{tool}, {name}"] = result
        details.append(f"{tool}, {name}: {result}, {why}")
    ran = [result for result in results.values() if result != "not run"]
    status = "fail" if "fail" in ran else "pass" if ran else "not run"
    return Part("sanitizer", status, "\n".join(details), figures=results)


def workload_command(name: str) -> list[str]:
    # -c and not this file, whose folder would be on the path instead of the root.
    code = f"from tools import gpu_check; gpu_check.workload({name!r})"
    return [sys.executable, "-c", code]


def benchmark(log: Path, seconds: float) -> Part:
    out = log.parent
    (out / "bench.csv").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks", "--gpu", "--no-plots", "--out", str(out)]
    command += ["--seconds", str(max(30, int(seconds) - 60))]
    status = run(command, seconds, log)
    part = outcome("benchmark", status, log)
    if status == 2:
        return Part("benchmark", "not run", tail(log))
    rows = figures(out)
    met = [row["met"] == "True" for row in rows if row.get("bar")]
    part.figures = {"figures": len(rows), "bars": len(met), "bars_met": sum(met)}
    part.detail = f"{len(rows)} figures, {sum(met)} of {len(met)} bars met\n{part.detail}".strip()
    return part


def figures(out: Path) -> list[dict]:
    path = out / "bench.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# In order, with the most seconds that each may take.
PARTS = {
    "build": (build, 420),
    "tests": (tests, 420),
    "sanitizer": (sanitizer, 420),
    "benchmark": (benchmark, 420),
}


def machine() -> dict[str, str]:
    import torch

    info = {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "memory_gib": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f}",
        "devices": str(torch.cuda.device_count()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    commands = {
        "driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
        "nvcc": [find_program("nvcc") or "nvcc", "--version"],
        "commit": ["git", "describe", "--always", "--dirty", "--exclude=*"],
    }
    for name, command in commands.items():
        try:
            output = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            output = "unknown"
        release = re.search(r"V([\d.]+)", output)
        info[name] = release[1] if name == "nvcc" and release else output.split("\n")[0]
    return info


def earlier(out: Path, info: dict[str, str]) -> dict[str, Part]:
    """The parts that commands before this one left in the report, of the same machine and code."""
    path = out / "report.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    # The report itself, where it is committed, makes a tree dirty.
    here, there = (
        {**i, "commit": i["commit"].removesuffix("-dirty")}
        for i in (info, content.get("machine", {"commit": ""}))
    )
    if here != there:
        return {}
    return {part["name"]: Part(**part) for part in content["parts"]}


def report(out: Path, info: dict[str, str], parts: list[Part]) -> None:
    rows = figures(out) if any(part.name == "benchmark" for part in parts) else []
    content = {"machine": info, "parts": [asdict(part) for part in parts]}
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = [f"# {info['device']}", ""]
    lines += [f"- {name}: {value}" for name, value in info.items() if name != "device"]
    lines += ["", "| part | result | seconds |", "|---|---|---|"]
    lines += [f"| {part.name} | {part.status} | {part.seconds:.0f} |" for part in parts]
    for part in parts:
        if part.detail:
            lines += ["", f"## {part.name}: {part.status}", "", "```", part.detail, "```"]
    judged = [row for row in rows if row.get("bar")]
    if judged:
        lines += [
            "",
            "## Bars",
            "",
            "| case | side | figure | bar | met |",
            "|---|---|---|---|---|",
        ]
        for row in judged:
            cells = (row["case"], row["side"], f"{row['p50']} {row['unit']}", row["bar"])
            lines.append(f"| {' | '.join(cells)} | {'yes' if row['met'] == 'True' else 'no'} |")
    (out / "report.md").write_text("\n".join([*lines, ""]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--built", type=Path, help="an extension to use instead of building one")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"argument --only: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if args.built and not args.built.is_file():
        parser.error(f"argument --built: {args.built} is not a file")

    found = requirements(names, args.built)
    for name, what in found.items():
        print(f"{name:17} {what or 'MISSING'}")
    if "sanitizer" in names:
        print(f"{'compute-sanitizer':17} {find_sanitizer() or 'missing: will not run'}")
    if missing := [name for name, what in found.items() if not what]:
        print(f"nothing was run: this machine lacks {', '.join(missing)}")
        return 2

    info = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
    out = (args.out or ROOT / "benchmarks" / "results" / slug).resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = earlier(out, info)
    usable = None
    for name in (name for name in PARTS if name in names):
        function, most = PARTS[name]
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        log = out / f"{name}.log"
        log.unlink(missing_ok=True)
        if name == "build":
            part = build(log, most, args.built)
            usable = part if part.status == "pass" else None
        else:
            usable = usable or self_check(log)
            if usable.status == "pass":
                part = function(log, most)
            else:
                part = Part(name, "not run", f"no extension that works\n{usable.detail}")
        part.seconds = time.monotonic() - began
        if part.status == "fail":
            cut(log)
        else:
            log.unlink(missing_ok=True)
        print(f"{name}: {part.status} ({part.seconds:.0f} s) {part.detail}", flush=True)
        # After each part, so that what was found is kept whatever happens to the next.
        parts[name] = part
        report(out, info, [parts[name] for name in PARTS if name in parts])
    print(out / "report.md")
    return 1 if any(parts[name].status == "fail" for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
