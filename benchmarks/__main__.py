"""Time dropout_ext beside torch, check its output, train with both, and write CSV and pictures.

python -m benchmarks            some ten minutes on two cores
python -m benchmarks --quick    under one (or QUICK=1)
python -m benchmarks --gpu      only what runs on the GPU
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks import record
from benchmarks.cases import ENVIRONMENTS

try:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from benchmarks import plots, tables
except ImportError as error:  # GPU machines without a network may have nothing but torch
    tables, missing = None, error

SECTIONS = (
    "micro", "bars", "family", "hugepages", "fused", "statistics", "training", "models",
    "attention", "compiled", "peers",
)  # fmt: skip
# Of each process on the CPU its environment and the sections that it may run. Models are apart,
# because what a process allocated before decides how often an allocation has to be paged in.
PROCESSES = (
    ("default", ("micro", "bars", "statistics", "training", "peers")),
    ("hugepages", ("models",)),
    ("resident", ("bars", "family")),
    ("hugepages", ("hugepages", "fused")),
    ("hugepages", ("attention",)),
    ("hugepages", ("compiled",)),
    ("avx2", ("bars", "fused")),
    ("portable", ("bars",)),
)
SLOWER = ("hugepages", "avx2", "portable")  # left out of quick runs
ON_GPU = ("statistics", "models", "training")


def plan(names, gpu, gpu_only, variants, quick):
    """(environment, on the GPU, sections) of every worker, in order."""
    if not gpu_only:
        for environment, sections in PROCESSES:
            if quick and environment in SLOWER and "models" not in sections:
                continue
            if environment in ("avx2", "portable") and environment not in variants:
                continue
            chosen = [name for name in names if name in sections]
            if chosen:
                yield environment, False, chosen
    if gpu:
        yield "default", True, ["gpu", *(name for name in names if name in ON_GPU)]


class NoProgress:
    """What is used of rich's progress bar, where rich is missing."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_task(self, description, total=None):
        return None

    def update(self, task, **_):
        pass

    advance = remove_task = update


def progress_bar(console):
    if tables is None:
        return NoProgress()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console)


def run_worker(environment, on_gpu, sections, args, progress, seconds, take, save):
    """Notes and whether all of the sections succeeded; each row goes to `take`. On a GPU, whose
    time may end before the benchmark, `save` is called as figures come."""
    command = [sys.executable, "-m", "benchmarks.worker", *sections]
    command += ["--quick"] * args.quick + ["--gpu"] * on_gpu
    env = os.environ | ENVIRONMENTS[environment] | {"BENCH_ENVIRONMENT": environment}
    env |= {"QUICK": "1" if args.quick else "", "BENCH_SECONDS": str(seconds)}
    where = "GPU" if on_gpu else environment
    task = progress.add_task(where, total=None)
    notes, section, began = [], "", time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        # What came before a hang still reaches the CSV.
        limit = threading.Timer(seconds + 20 if on_gpu else 1800, worker.kill)
        limit.start()
        for line in worker.stdout:
            if not line.endswith("\n"):  # cut short
                break
            message = json.loads(line)
            if "total" in message:
                progress.update(task, total=message["total"], completed=0)
                if "section" in message:
                    section = message["section"]
                    progress.update(task, description=f"{section} ({where})")
            elif "row" in message:
                take(message["row"])
            elif "note" in message:
                notes.append(message["note"])
            elif "step" in message:
                progress.advance(task)
                if on_gpu:
                    save()
        status = worker.wait()
        limit.cancel()
        errors.seek(0)
        log = errors.read()
    progress.remove_task(task)
    if status != 0:
        # Without a trace of its own where it was killed, because it took too long.
        ended = f"status {status} after {time.monotonic() - began:.0f} s, last in {section}"
        notes.append(f"{', '.join(sections)} ({where}) FAILED, {ended}:\n{log[-6000:]}")
    return notes, status == 0


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="under a minute (or QUICK=1)")
    parser.add_argument("--gpu", action="store_true", help="only what runs on the GPU")
    parser.add_argument("--only", help=f"sections, comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder for CSV and pictures")
    parser.add_argument("--no-plots", action="store_true", help="draw no pictures")
    parser.add_argument("--seconds", type=float, help="stop taking GPU figures after this long")
    args = parser.parse_args(argv)
    args.quick = args.quick or os.environ.get("QUICK", "0") not in ("", "0")
    names = args.only.split(",") if args.only else SECTIONS
    if set(names) - set(SECTIONS):
        parser.error(f"argument --only: {args.only!r}; accepted are {', '.join(SECTIONS)}")

    console = tables.terminal() if tables else None
    say = console.print if tables else print
    try:
        import torch

        import dropout_ext
    except ImportError as error:
        say(f"{error}; run make build first")
        return 2
    info = dropout_ext.build_info()
    gpu = torch.cuda.is_available() and info.get("cuda", False)
    if args.gpu and not gpu:
        reason = "this build has no CUDA" if torch.cuda.is_available() else "torch sees no GPU"
        say(f"--gpu: not run, {reason}")
        return 2
    devices = {"cpu": record.cpu_name()}
    if gpu:
        devices["cuda"] = torch.cuda.get_device_name()
    machine = record.slug(devices["cuda" if args.gpu else "cpu"])
    out = args.out or record.RESULTS / (machine + "-quick" * args.quick)

    began = time.monotonic()
    budget = args.seconds or (220 if args.gpu else 100)
    commit, rows, notes, ok = record.commit(), [], [], True

    def take(row):
        rows.append(row | {"device": devices[row["device"]], "commit": commit})

    def save():
        record.write(rows, out / "bench.csv")

    workers = list(plan(names, gpu, args.gpu, info.get("cpu_variants", ()), args.quick))
    with progress_bar(console) as progress:
        whole = progress.add_task("processes", total=len(workers))
        for environment, on_gpu, sections in workers:
            before = len(rows)
            said, good = run_worker(
                environment, on_gpu, sections, args, progress, budget, take, save
            )
            notes += said
            ok &= good
            progress.advance(whole)
            if not (tables and console.is_terminal):
                where = "GPU" if on_gpu else environment
                say(f"{', '.join(sections)} ({where}): {len(rows) - before} figures")

    drawn = []
    if rows:
        save()
        if tables:
            table = record.read(out / "bench.csv")
            tables.show(table, console)
            drawn = [] if args.no_plots else [path.name for path in plots.draw(table, out)]
        else:
            say(f"no tables and pictures: {missing}")
            for row in rows:
                if row.get("bar"):
                    met = "met" if row["met"] else "NOT MET"
                    say(f"{row['case']}: {row['side']}: {row['p50']:.3g} {row['bar']} {met}")
        say(f"{out / 'bench.csv'}{', ' * bool(drawn)}{', '.join(drawn)}")
    for note in notes:
        print(note)
    say(f"{time.monotonic() - began:.0f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
