"""One CSV per machine: its columns, and the names of the machine and the versions in it."""

import csv
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = [
    "section", "case", "op", "dtype", "shape", "elements", "p", "threads", "environment",
    "side", "role", "metric", "unit", "p20", "p50", "p80", "rounds",
    "bytes_moved", "share_of_floor", "expected", "bar", "met",
    "device", "cpu_variant", "torch", "dropout_ext", "python", "commit",
]  # fmt: skip


def cpu_name():
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark

        info = get_cpu_info()
    except ImportError:
        info = {}
    name = re.sub(r"\((R|TM)\)| CPU| Processor|@.*", "", info.get("brand_raw", "")).strip()
    name = name or platform.machine()
    if info.get("vendor_id_raw") == "AuthenticAMD":
        # Virtual machines hide the model's name but not its family.
        zen = {25: "Zen 4" if "avx512f" in info["flags"] else "Zen 3", 26: "Zen 5"}
        if info.get("family") in zen:
            name += f" ({zen[info['family']]})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} core{'s' if cores != 1 else ''}"


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions():
    import torch

    import dropout_ext

    info = dropout_ext.build_info()
    return {
        "cpu_variant": info.get("cpu_variant"),
        "torch": torch.__version__,
        "dropout_ext": info.get("version") or metadata.version("dropout_ext"),
        "python": platform.python_version(),
    }


def write(rows, path):
    """Whole or not at all: whoever reads it while it is written sees the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(fresh, path)


def read(path):
    """The CSV as a pandas table; ValueError where it is not one of ours."""
    import pandas as pd

    table = pd.read_csv(path, keep_default_na=True, low_memory=False)
    missing = set(COLUMNS) - set(table.columns)
    if missing:
        raise ValueError(f"{path}: not a benchmark CSV, it lacks {sorted(missing)}")
    return table
