"""Before and after of two commits, interleaved: time of HEAD over time of BASE, with spread.

python -m benchmarks.compare BASE           this working tree, as built, against BASE
python -m benchmarks.compare BASE HEAD      two commits

A commit is exported to build/compare/<hash> and built there with this interpreter. Both extensions
live in a process of their own, take turns within every round, and run the same benchmark code:
that of this tree. The allocator keeps its pages, so that page faults do not hide the difference;
the processes start anew several times, because where a process puts its memory is luck, too.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from rich.table import Table

from benchmarks import cases, record
from benchmarks.cases import Ki, Mi
from benchmarks.tables import terminal


def compared(quick):
    """Cases of our sides alone."""
    for n in (16, Mi) if quick else (16, 4 * Ki, 64 * Ki, Mi, 16 * Mi):
        for dtype in ("float32",) if quick else ("float32", "bfloat16"):
            for op in ("forward", "forward and backward"):
                yield cases.Case("micro", op, dtype, (n,), (cases.MODULE,))
            side = (cases.IN_PLACE,)
            yield cases.Case("micro", "forward in place", dtype, (n,), side)
    for case in cases.family(quick):
        ours = next(side for side in case.sides if side.role == "ours")
        yield replace(case, sides=(ours,), environment="default")


def serve(tree, quick):
    """Answer requests on stdin for the extension of `tree`, one JSON object per line."""
    from benchmarks import timing

    sys.path.insert(0, tree)
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import dropout_ext

    if not Path(dropout_ext.__file__).is_relative_to(tree):
        raise RuntimeError(f"imported {dropout_ext.__file__}, which is not in {tree}")
    every = list(compared(quick))
    contestant = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "case" in request:
                case = every[request["case"]]
                contestant = timing.Contestant(case, case.sides[0], block=4e-3)
                answer = {"loops": contestant.loops, "seconds": contestant.seconds}
            else:
                contestant.timer.timeit(1 + request["loops"] // 10)  # awake and in cache
                answer = {"seconds": contestant.timer.timeit(request["loops"])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(answer) + "\n")


class Worker:
    def __init__(self, tree, quick):
        command = [sys.executable, "-m", "benchmarks.compare", "--serve", str(tree)]
        self.process = subprocess.Popen(
            command + ["--quick"] * quick,
            cwd=record.ROOT,
            env=os.environ | cases.RESIDENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"worker ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def git(*arguments):
    command = ["git", "-C", str(record.ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout


def built(commit, console):
    """The folder of the commit's tree with its extension built in place."""
    full = git("rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()
    tree = record.ROOT / "build" / "compare" / full[:12]
    done = tree / ".built"
    if not done.exists():
        console.print(f"building {commit} ({full[:12]})")
        tree.mkdir(parents=True, exist_ok=True)
        # The filter is missing from early Python 3.10 releases.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(fileobj=io.BytesIO(git("archive", full))) as archive:
            archive.extractall(tree, **safe)
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        result = subprocess.run(build, cwd=tree, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{commit} does not build:\n{(result.stdout + result.stderr)[-4000:]}")
        done.touch()
    return tree


def measure(trees, names, quick, console):
    """{case: [(before, after) seconds per call of each round]} and {case: why it is missing}."""
    every = list(compared(quick))
    restarts, rounds = (2, 5) if quick else (4, 12)
    seconds, errors = {index: [] for index in range(len(every))}, {}
    steps = [(restart, index) for restart in range(restarts) for index in range(len(every))]
    workers = []
    for _, index in track(steps, "comparing", console=console):
        if index == 0:
            for worker in workers:
                worker.close()
            workers = [Worker(tree, quick) for tree in trees]
        ready = [worker.ask(case=index) for worker in workers]
        missing = [f"{n}: {r['error']}" for n, r in zip(names, ready, strict=True) if "error" in r]
        if missing:
            errors[index] = "; ".join(missing)[:80]
            continue
        loops = ready[0]["loops"]
        for r in range(rounds):
            pair = [0.0, 0.0]
            for i in (0, 1) if r % 2 else (1, 0):
                pair[i] = workers[i].ask(loops=loops)["seconds"] / loops
            seconds[index].append(pair)
    for worker in workers:
        worker.close()
    return seconds, errors


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.splitlines()[0]
    )
    parser.add_argument("base", nargs="?", help="commit to compare with")
    parser.add_argument("head", nargs="?", help="commit to judge; default: this tree, as built")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        return serve(args.serve, args.quick)
    if not args.base:
        parser.error("BASE is missing: the commit to compare with")

    console = terminal()
    try:
        trees = [built(args.base, console)]
        trees.append(built(args.head, console) if args.head else record.ROOT)
    except subprocess.CalledProcessError as error:
        parser.error(error.stderr.decode().strip())
    names = args.base, args.head or f"this tree ({record.commit()})"
    seconds, errors = measure(trees, names, args.quick, console)
    table = Table(
        title=f"{names[1]} against {names[0]}, {record.cpu_name()}",
        caption="one thread; ns per element, medians; below 1: the second is faster; p20-p80",
    )
    for column in ("case", "before", "after", "after / before", "p20-p80", ""):
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    for index, case in enumerate(compared(args.quick)):
        if index in errors:
            table.add_row(str(case), "-", "-", "-", "-", errors[index])
            continue
        pairs = np.array(seconds[index])
        before, after = np.median(pairs, axis=0) / case.elements * 1e9
        p20, p50, p80 = np.quantile(pairs[:, 1] / pairs[:, 0], (0.2, 0.5, 0.8))
        verdict = "[red]slower" if p20 > 1.02 else "[green]faster" if p80 < 0.98 else ""
        ratio = f"{p50:.3f}", f"{p20:.3f}-{p80:.3f}"
        table.add_row(str(case), f"{before:.3f}", f"{after:.3f}", *ratio, verdict)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
