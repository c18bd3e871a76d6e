"""Statistics of the keep masks, of nn.Dropout's beside them, and of generators broken on purpose.

python -m benchmarks.stats            under half an hour on two cores
python -m benchmarks.stats --quick    under a minute (or QUICK=1)
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks import record


@dataclass(frozen=True)
class Size:
    """Numbers of elements, powers of two, and counts."""

    rate: int  # drop rate, per p
    dtype: int  # drop rate, per p and dtype
    path: int  # drop rate, per p and path
    mask: int  # lags and blocks
    matrix: int  # rows and columns
    runs: int
    pair: int  # of each of two masks that are compared
    keys: int  # how many such comparisons are pooled
    flips: int  # of each mask whose key differs in one bit
    output: int  # moments, per dtype, layout and p
    sum: int
    words: int
    covariance_pairs: int
    covariance_step: int


QUICK = Size(
    rate=2**24, dtype=2**20, path=2**20, mask=2**24, matrix=2**22, runs=2**22, pair=2**18, keys=8,
    flips=2**16, output=2**16, sum=2**20, words=2**22, covariance_pairs=2**27, covariance_step=64,
)  # fmt: skip
FULL = Size(
    rate=2**30, dtype=2**28, path=2**28, mask=2**30, matrix=2**28, runs=2**26, pair=2**22, keys=64,
    flips=2**22, output=2**20, sum=2**28, words=2**26, covariance_pairs=10**11 // 2**25 * 2**25,
    covariance_step=1,
)  # fmt: skip
# nn.Dropout takes 10 to 40 times as long.
QUICK_TORCH = replace(QUICK, rate=2**22, mask=2**22, dtype=2**18, path=2**18)
FULL_TORCH = replace(FULL, rate=2**28, dtype=2**24, path=2**24, mask=2**28, sum=2**25)
MUTATION = replace(
    QUICK, rate=2**21, mask=2**22, matrix=2**20, runs=2**20, pair=2**16, keys=4, flips=2**14,
    sum=2**18, words=2**20,
)  # fmt: skip

SECTIONS = (
    "rates",
    "independence",
    "keys",
    "output",
    "words",
    "covariance",
    "dieharder",
    "mutations",
)
NO_DIEHARDER = "dieharder: NOT RUN, it is not installed (Debian: apt-get install dieharder)"


def mutations(size, names=None):
    """The battery over the contract as it is, which has to pass, and over its broken copies."""
    from benchmarks.stats import keys, masks, output, words
    from benchmarks.stats.subjects import MUTATIONS, Contract

    for name in names or ("unbroken", *MUTATIONS):
        subject = Contract(name, MUTATIONS[name][0] if name in MUTATIONS else ())
        parts = masks.rates, masks.independence, keys.between, output.sums, words.words
        for part in parts:
            for outcome in part(subject, size):
                outcome.subject = name
                yield outcome


def uncaught(results, level):
    """What the mutations should have shown and did not."""
    from benchmarks.stats import report
    from benchmarks.stats.subjects import MUTATIONS

    seen = report.caught(results, level)
    for name, (_, tests) in MUTATIONS.items():
        for test in sorted(tests):
            if not any(found.startswith(test) for found in seen.get(name, ())):
                yield f"{name}: {test} does not see it"
    for test in seen.get("unbroken", ()):
        yield f"unbroken: {test} sees a deviation"


def outcomes(section, args):
    from benchmarks.stats import covariance, dieharder, keys, masks, output, report, words
    from benchmarks.stats.subjects import Contract, Product, TorchDropout

    size, torch_size = (QUICK, QUICK_TORCH) if args.quick else (FULL, FULL_TORCH)
    both = {
        "rates": masks.rates,
        "independence": masks.independence,
        "keys": keys.between,
        "output": output.all_outputs,
    }
    if section in both:
        for subject, its_size in ((Product(), size), (TorchDropout(), torch_size)):
            for outcome in both[section](subject, its_size):
                outcome.subject = subject.name
                yield outcome
    elif section == "mutations":
        yield from mutations(MUTATION)
    else:
        contract = Contract()
        if section == "words":
            parts = [words.agreement(contract, size), words.words(contract, size)]
        elif section == "covariance":
            parts = [covariance.all_covariances(None, size)]
        else:
            parts = [dieharder.all_streams(contract, args.quick)]
        for part in parts:
            for outcome in part:
                outcome.subject = report.OURS
                yield outcome


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stats", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="under a minute (or QUICK=1)")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="folder for the CSV and the report")
    args = parser.parse_args(argv)
    args.quick = args.quick or os.environ.get("QUICK", "0") not in ("", "0")
    sections = args.only.split(",") if args.only else SECTIONS
    if set(sections) - set(SECTIONS):
        parser.error(f"argument --only: {args.only!r}; accepted are {', '.join(SECTIONS)}")

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    try:
        import dropout_ext  # noqa: F401
    except ImportError as error:
        console.print(f"{error}; run [bold]make build[/] first")
        return 2
    from benchmarks.stats import dieharder, report

    began, results, notes = time.monotonic(), [], []
    for section in sections:
        if section == "dieharder" and not dieharder.available():
            notes.append(NO_DIEHARDER)
            continue
        start = time.monotonic()
        with console.status(section) as status:
            for outcome in outcomes(section, args):
                results.append(outcome)
                status.update(f"{section}: {outcome.subject}, {outcome.test}")
        console.print(f"{section}: {time.monotonic() - start:.1f} s", style="dim")

    level = report.significance(results)
    if "mutations" in sections:
        notes += uncaught(results, level)
    about = {"machine": record.cpu_name()} | record.versions() | {"commit": record.commit()}
    out = args.out or record.RESULTS / (record.slug(about["machine"]) + "-quick" * args.quick)
    name = "stats" + ("-" + "-".join(sections) if args.only else "")
    out.mkdir(parents=True, exist_ok=True)
    report.frame(results, level, about).to_csv(out / f"{name}.csv", index=False)
    lines = report.markdown(results, level, about, notes)
    (out / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")

    console.print(report.table(results, level))
    if "mutations" in sections:
        console.print(report.mutation_table(results, level))
    console.print(report.summary(results, level))
    for note in notes:
        console.print(note, markup=False, style="yellow")
    console.print(f"{out / name}.csv and .md; {time.monotonic() - began:.0f} s")
    failed = any(r.subject == report.OURS and r.asserted and r.seen(level) for r in results)
    broken = any(note != NO_DIEHARDER for note in notes)
    return 1 if failed or broken else 0


if __name__ == "__main__":
    sys.exit(main())
