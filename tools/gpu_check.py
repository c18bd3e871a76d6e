"""Everything that needs a GPU, in one command and in under ten minutes: build, tests,
compute-sanitizer, benchmark. Needs what is installed there (a CUDA torch, nvcc, ninja, pybind11,
pytest) and no network.

    python tools/gpu_check.py [--only build,tests,memcheck,racecheck,benchmark] [--out FOLDER]

Leaves a report (JSON, CSV, Markdown, picture) in benchmarks/results/<device>. A part that the
machine cannot run is reported as not run, with the reason, and the rest goes on. Exit status: 0 if
nothing failed, 1 if something did, 2 if the machine lacks what every part needs.
"""

from __future__ import annotations

import argparse
import ast
import csv
import html
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
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 570
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


def requirements() -> dict[str, str]:
    """What every part needs, and what was found; empty where it is missing."""
    found = {}
    try:
        import torch

        found["torch with CUDA"] = torch.__version__ if torch.version.cuda else ""
        gpu = torch.cuda.is_available()
        found["GPU"] = torch.cuda.get_device_name() if gpu else ""
    except ImportError:
        found["torch with CUDA"] = found["GPU"] = ""
    found["nvcc"] = find_program("nvcc") or ""
    found["C++ compiler"] = shutil.which(os.environ.get("CXX", "c++")) or ""
    for package in ("ninja", "pybind11", "pytest"):
        module = importlib.util.find_spec(package)
        # The pybind11 that torch brings along serves as well.
        found[package] = version(package) if module else "with torch" * (package == "pybind11")
    if not found["ninja"] and shutil.which("ninja"):
        found["ninja"] = shutil.which("ninja")
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "found"


def run(command: list[str], seconds: float, log: Path, **env: str) -> int | None:
    """Exit status, None for a command that took too long and was ended with its children."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def outcome(name: str, status: int | None, log: Path) -> Part:
    if status == 0:
        return Part(name, "pass", "")
    what = "took too long" if status is None else f"exit status {status}"
    return Part(name, "fail", f"{what}\n{tail(log)}")


def build(out: Path, logs: Path, seconds: float) -> Part:
    import torch

    arch = "{}.{}".format(*torch.cuda.get_device_capability())
    env = {"TORCH_CUDA_ARCH_LIST": arch, "DROPOUT_EXT_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    part = outcome("build", run(command, seconds, logs / "build.log", **env), logs / "build.log")
    if part.status == "fail":
        return part
    log = logs / "self_check.log"
    part = outcome("build", run([sys.executable, "-m", "dropout_ext"], 60, log), log)
    part.detail = part.detail or f"for sm_{arch.replace('.', '')}, self-check passed"
    return part


def unavailable_tests() -> dict[str, str]:
    """Test files that import, at their top, a package that is not installed."""
    missing = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in (name.split(".")[0] for name in names):
                local = any(
                    (ROOT / folder / f"{name}.py").exists() for folder in ("tests", "tools")
                )
                if not local and importlib.util.find_spec(name) is None:
                    missing[path.name] = name
    return missing


def tests(out: Path, logs: Path, seconds: float) -> Part:
    log, junit = logs / "tests.log", logs / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    command += ["--tb=short", f"--junitxml={junit}"]
    left_out = unavailable_tests()
    command += [f"--ignore=tests/{name}" for name in left_out]
    part = outcome("tests", run(command, seconds, log), log)
    if junit.exists():
        suite = ElementTree.parse(junit).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        part.figures = counts
        failed = counts["failures"] + counts["errors"]
        ran = counts["tests"] - counts["skipped"]
        summary = f"{ran - failed} passed, {failed} failed, {counts['skipped']} skipped"
        skips = {case.find("skipped").get("message") for case in suite.iter("testcase")
                 if case.find("skipped") is not None}  # fmt: skip
        notes = [summary, *(f"skipped: {reason}" for reason in sorted(filter(None, skips)))]
        part.detail = "\n".join([*notes, part.detail]).strip()
        if ran == 0 and part.status == "pass":
            part.status = "fail"
    for name, package in left_out.items():
        part.detail += f"\nnot run: tests/{name} ({package} is not installed)"
    return part


def workload() -> None:
    """Every path, dtype and misalignment once, for compute-sanitizer."""
    import torch

    import dropout_ext

    key = dropout_ext.key(42)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    apply = torch.ops.dropout_ext.apply
    for dtype in (*dtypes, torch.complex128):
        for size in (1, 9, 1025, 5003):
            for begin in (0, 1, 3):
                x = torch.ones(size + begin, device="cuda", dtype=dtype)[begin:]
                apply(x, key, 0.5, 2.0, (), 0)
                torch.ops.dropout_ext.apply_(x, key.cuda(), 0.5, 2.0, (), 3)
        x = torch.ones(3, 5, 33, 17, device="cuda", dtype=dtype)
        apply(x, key, 0.5, 2.0, (5, 1, 0, 0), 0)
        apply(x.contiguous(memory_format=torch.channels_last), key, 0.5, 2.0, (), 7)
        apply(x.transpose(0, 3), dropout_ext.split(key, 17), 0.5, 2.0, (), 0)
        apply(x[:1, :, 1:, ::2].expand(3, 5, 32, 9), key, 1.0, 2.0, (), 0)
    dropout_ext.functional.alpha_dropout(x.real.contiguous(), 0.5, True)
    dropout_ext.keep_mask((5, 1001), 0.5, key, device="cuda")
    torch.cuda.synchronize()
    print(WORKLOAD_DONE)


def sanitize(tool: str, logs: Path, seconds: float) -> Part:
    sanitizer = find_program("compute-sanitizer", "compute-sanitizer", "extras/compute-sanitizer")
    if sanitizer is None:
        return Part(tool, "not run", "compute-sanitizer was not found")
    log = logs / f"{tool}.log"
    # Without torch's caching allocator, so that an overrun leaves its allocation.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(Path(__file__).resolve()), "--workload"]
    began = time.monotonic()
    status = run(script, seconds / 2, logs / "workload.log", **env)
    if status != 0:
        return outcome(tool, status, logs / "workload.log")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *script]
    status = run(command, seconds - (time.monotonic() - began), log, **env)
    text = log.read_text(errors="replace")
    errors = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if errors and int(errors[1]) > 0 and WORKLOAD_DONE in text:
        return Part(tool, "fail", f"{errors[0]}\n{tail(log, 40)}")
    if errors and int(errors[1]) == 0 and WORKLOAD_DONE in text and status == 0:
        return Part(tool, "pass", errors[0])
    if errors and re.search(r"Invalid __\w+__ (read|write)|Misaligned|hazard", text):
        return Part(tool, "fail", tail(log, 40))
    # The workload passes without the tool, so it is the tool that does not work here.
    what = "it took too long" if status is None else f"exit status {status}"
    return Part(tool, "not run", f"compute-sanitizer does not work here, {what}\n{tail(log)}")


def memcheck(out: Path, logs: Path, seconds: float) -> Part:
    return sanitize("memcheck", logs, seconds)


def racecheck(out: Path, logs: Path, seconds: float) -> Part:
    return sanitize("racecheck", logs, seconds)


def benchmark(out: Path, logs: Path, seconds: float) -> Part:
    if not (ROOT / "benchmarks" / "__main__.py").exists():
        return Part("benchmark", "not run", "benchmarks/ is not here")
    log = logs / "benchmark.log"
    command = [sys.executable, "-m", "benchmarks", "--gpu", "--out", str(out)]
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
    "build": (build, 200),
    "tests": (tests, 200),
    "memcheck": (memcheck, 80),
    "racecheck": (racecheck, 60),
    "benchmark": (benchmark, 280),
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


def shares(rows: list[dict]) -> list[tuple[str, float]]:
    """Ours beside the floor, where the benchmark has both."""
    found = []
    for row in rows:
        timed = row.get("metric", "time") == "time" and row.get("role") == "ours"
        if timed and row.get("share_of_floor"):
            label = f"{row['op']} {row['dtype']} {row['elements']}"
            found.append((label, float(row["share_of_floor"])))
    return found


def draw(rows: list[dict], path: Path, device: str) -> None:
    """Bars of the share of the floor, as SVG: needs no plotting library."""
    bars = shares(rows)
    width, line = 720, 18
    height = 60 + line * len(bars)
    style = 'font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {style}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="20">{html.escape(device)}: share of the floor (y.copy_(x))</text>',
    ]
    for i, (label, share) in enumerate(bars):
        y = 36 + line * i
        parts.append(f'<text x="10" y="{y + 12}">{html.escape(label)}</text>')
        size = 300 * min(share, 1.3)
        parts.append(f'<rect x="300" y="{y}" width="{size:.0f}" height="13" fill="#4477aa"/>')
        parts.append(f'<text x="{310 + size:.0f}" y="{y + 12}">{share:.2f}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]))


def report(out: Path, info: dict[str, str], parts: list[Part], seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = figures(out) if any(p.name == "benchmark" and p.figures for p in parts) else []
    pictures = [path.name for path in sorted(out.glob("*.png"))] if rows else []
    if rows and not pictures:
        draw(rows, out / "floor.svg", info["device"])
        pictures = ["floor.svg"]
    content = {
        "machine": info,
        "seconds": round(seconds, 1),
        "parts": [asdict(part) for part in parts],
        "figures": rows,
        "pictures": pictures,
    }
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    with (out / "report.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "status", "seconds", "detail", *info])
        for part in parts:
            first = part.detail.split("\n")[0]
            writer.writerow([part.name, part.status, f"{part.seconds:.1f}", first, *info.values()])
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
    lines += [line for name in pictures for line in ("", f"![{name}]({name})")]
    (out / "report.md").write_text("\n".join([*lines, ""]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--out", type=Path, help="folder of the report")
    parser.add_argument("--workload", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.workload:
        workload()
        return 0
    names = args.only.split(",")
    if unknown := set(names) - set(PARTS):
        parser.error(f"argument --only: {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")

    found = requirements()
    for name, what in found.items():
        print(f"{name:16} {what or 'MISSING'}")
    sanitizer = find_program("compute-sanitizer", "compute-sanitizer", "extras/compute-sanitizer")
    print(f"{'compute-sanitizer':16} {sanitizer or 'missing: memcheck and racecheck will not run'}")
    if missing := [name for name, what in found.items() if not what]:
        print(f"nothing was run: this machine lacks {', '.join(missing)}")
        return 2

    began = time.monotonic()
    info = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", info["device"].lower()).strip("-")
    out = (args.out or ROOT / "benchmarks" / "results" / slug).resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in PARTS if name in names):
            function, most = PARTS[name]
            left = TOTAL_SECONDS - (time.monotonic() - began)
            start = time.monotonic()
            if parts and parts[0].name == "build" and parts[0].status == "fail":
                part = Part(name, "not run", "the build failed")
            elif left < 20:
                part = Part(name, "not run", "no time left")
            else:
                print(f"{name} ...", flush=True)
                part = function(out, Path(folder), min(most, left))
            part.seconds = time.monotonic() - start
            parts.append(part)
            print(f"{name}: {part.status} ({part.seconds:.0f} s) {part.detail}", flush=True)
            # After each part, so that what was found is kept whatever happens to the next.
            report(out, info, parts, time.monotonic() - began)
    print(f"{out / 'report.md'} ({time.monotonic() - began:.0f} s)")
    return 1 if any(part.status == "fail" for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
