"""Brown's dieharder, with Marsaglia's tests and three of NIST's SP 800-22, over streams of words.

Of the NIST suites on PyPI (nistrng, sts-pylib, coinflip) none has had a release since 2021.
"""

import contextlib
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

from benchmarks.stats import result

DO_NOT_USE = {5, 6, 7, 14}  # by its own list of tests: suspect, or "Do Not Use"
PART = 2**20  # elements at a time

# (test, ntuple) of a run of all tests; None: its default.
ALL = [
    *((d, None) for d in (*range(18), 100, 101, 102)),
    *((200, n) for n in range(1, 13)),
    *((201, n) for n in range(2, 6)),
    *((202, n) for n in range(2, 6)),
    *((203, n) for n in range(33)),
    *((d, None) for d in (204, 205, 206, 207, 208, 209)),
]
QUICK = [(d, None) for d in (0, 4, 8, 15, 100)]
SHORT = [*((d, None) for d in (0, 3, 4, 8, 9, 15, 16, 100, 101, 102, 205)), (200, 2)]


def available():
    return shutil.which("dieharder") is not None


# Bytes from element `first` on, by key.
def upper_halves(contract, key, first):
    return contract.upper_halves(key, PART, first)


def element_words(contract, key, first):
    return contract.words(key, PART, first)


def mask_bits(contract, key, first):
    return contract.bits(key, 0.5, PART, first)


STREAMS = {
    "upper halves of words": upper_halves,
    "mask bits at p = 0.5": mask_bits,
    "32-bit words": element_words,
}


def _feed(process, make, contract, key):
    first = 0
    try:
        while process.poll() is None:
            process.stdin.write(make(contract, key, first).data)
            first += PART
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def run_one(contract, stream, key, test, ntuple):
    """Lines (name, ntuple, samples, p-value) of one dieharder test."""
    command = ["dieharder", "-d", str(test), "-g", "200", "-c", ","]
    command += ["-D", "test_name", "-D", "ntuple", "-D", "tsamples", "-D", "psamples"]
    command += ["-D", "pvalues"] + (["-n", str(ntuple)] if ntuple is not None else [])
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with ThreadPoolExecutor(1) as pool:
        feeder = pool.submit(_feed, process, STREAMS[stream], contract, key)
        text = process.stdout.read().decode()
        process.wait()
        feeder.result()
    lines = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 5 and re.fullmatch(r"\d+", fields[1]):
            name, n, in_sample, samples, p_value = fields[:5]
            lines.append((name, int(n), int(in_sample) * int(samples), float(p_value)))
    if process.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)} gave {process.returncode}:\n{text}")
    return lines


def run(contract, stream, tests, *, asserted, workers=2):
    """Each test reads a part of the stream of its own: its own offset of one seed."""

    def one(at):
        test, ntuple = tests[at]
        key = (90 + list(STREAMS).index(stream), 1000 * test + (ntuple or 0))
        for name, n, samples, p_value in run_one(contract, stream, key, test, ntuple):
            # Printed with eight decimals: 0.00000000 is below 5e-9, and counts as 0. A p-value that
            # is too good is as suspect as one that is too bad.
            two_sided = min(1.0, 2 * min(p_value, 1 - p_value))
            yield result.Result(
                "dieharder", f"{name} {n}, {stream}", None, samples, "p", p_value, "U(0, 1)",
                two_sided, asserted=asserted and test not in DO_NOT_USE,
            )  # fmt: skip

    with ThreadPoolExecutor(workers) as pool:
        for lines in pool.map(lambda at: list(one(at)), range(len(tests))):
            yield from lines


def all_streams(contract, quick):
    if quick:
        yield from run(contract, "upper halves of words", QUICK, asserted=True)
        return
    yield from run(contract, "upper halves of words", ALL, asserted=True)
    yield from run(contract, "mask bits at p = 0.5", SHORT, asserted=True)
    yield from run(contract, "32-bit words", SHORT, asserted=False)
