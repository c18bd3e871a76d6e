"""The CPU microbenchmarks, driven by pytest-benchmark; `python -m benchmarks` collects the rows.

    BENCH_SECTIONS=micro,bars pytest benchmarks/test_micro.py

One test is one case. Its rounds go around the sides, so that all of them see the same machine:
round r of side i is measurement r * sides + i. The table that pytest-benchmark prints mixes the
sides; the rows carry them apart.
"""

import itertools
import os

import numpy as np
import pytest
import torch

from benchmarks import cases, timing

QUICK = os.environ.get("QUICK", "0") not in ("", "0")
SELECTED = cases.select(
    os.environ.get("BENCH_SECTIONS", "micro").split(","),
    os.environ.get("BENCH_ENVIRONMENT", "default"),
    QUICK,
)


@pytest.mark.parametrize("case", SELECTED, ids=str)
def test_case(case, benchmark, record_property):
    with timing.threads(case.threads):
        for side in case.sides:
            if side.role == "ours":
                timing.check(case, side)
        contestants, rounds, notes = timing.prepare(case, QUICK)
        turns = itertools.cycle(contestants)

        def next_side():
            contestant = next(turns)
            if torch.get_num_threads() != contestant.threads:
                torch.set_num_threads(contestant.threads)
                contestant.timer.timeit(1)
            return (contestant.timer, contestant.loops), {}

        benchmark.pedantic(
            lambda timer, loops: timer.timeit(loops),
            setup=next_side,
            rounds=rounds * len(contestants),
        )
    if benchmark.disabled:
        return
    loops = np.array([contestant.loops for contestant in contestants])
    seconds = np.array(benchmark.stats.stats.data).reshape(rounds, len(contestants)) / loops
    record_property("rows", list(timing.rows(case, contestants, seconds)))
    record_property("notes", notes)
