"""GPU figures: device time by CUDA events, host time per call, memory, independence of calls.

Sides take turns within a round. Before what is timed a buffer larger than the L2 cache is read, so
that no input is in the cache and none of its lines waits to be written back, and the stream is put
to sleep until all kernels are enqueued: what the events see is the device's time alone. Small
tensors are timed by the batch, because events resolve half a microsecond: all calls of a batch but
the first find their input in the cache.
"""

import os
import time
import traceback
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import cases, timing
from benchmarks.cases import Case, Ki, Mi, P, Side

Gi = 2**30
ASLEEP = 600_000  # cycles, some 0.3 ms: mostly longer than the calls take to enqueue
MOST_ASLEEP = 2**29
BATCHED = 4 * Mi  # elements that a batch of calls goes through, in
MOST_CALLS = 50  # calls at most: the queue holds about a thousand kernels
DTYPES = ("float32", "bfloat16", "float16")

COPY = Side("y.copy_(x)", "floor", "y.copy_(x)", "y = torch.empty_like(x)")
TRITON = Side(
    "Triton, seeded", "peer", "dropout(x, p)", "from benchmarks.triton_dropout import dropout"
)
COMPILED = Side(
    "torch.compile(nn.Dropout)",
    "peer",
    "m(x)",
    "torch._dynamo.reset(); m = torch.compile(torch.nn.Dropout(p))",
)


def function(case, side, names):
    """The side's statement as a function; the floor of forward and backward is two copies."""
    statement = case.statement(side)
    if side.role == "floor" and case.op == "forward and backward":
        statement = "(y.copy_(x), y.copy_(g))"
        names["x"].requires_grad_(False)
    return eval(f"lambda: {statement}", names)


def evict(buffer):
    """Fills the cache with lines of `buffer`, by reading alone."""
    buffer.sum()


def device_seconds(functions, rounds, calls=1):
    """Device time per call of each function per round, one column per function."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.zeros(max(l2, 2**24), device="cuda")  # four bytes each
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for f in functions:
        for _ in range(3):
            f()
    seconds = np.empty((rounds, len(functions)))
    asleep = ASLEEP
    for r in range(rounds):
        for k in range(len(functions)):
            i = (k + r) % len(functions)
            while True:
                evict(buffer)
                torch.cuda._sleep(asleep)
                start.record()
                for _ in range(calls):
                    functions[i]()
                end.record()
                enqueued = not start.query()  # all of it, before the first kernel ran
                end.synchronize()
                if enqueued or asleep >= MOST_ASLEEP:
                    break
                asleep *= 2
            seconds[r, i] = start.elapsed_time(end) * 1e-3 / calls
    return seconds


def host_seconds(functions, rounds, calls=100):
    """Time per call until it returns, the queue empty at the start and never full."""
    for f in functions:
        for _ in range(calls):
            f()
    seconds = np.empty((rounds, len(functions)))
    for r in range(rounds):
        for k in range(len(functions)):
            i = (k + r) % len(functions)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(calls):
                functions[i]()
            seconds[r, i] = (time.perf_counter() - began) / calls
    torch.cuda.synchronize()
    return seconds


def check(dtype):
    """AssertionError unless output and gradient equal the CPU's for one key, odd sizes included."""
    import dropout_ext

    for n in (1, 1023, Mi + 5):
        key = dropout_ext.key(7, 3)
        x = torch.randn(n).to(getattr(torch, dtype))
        on_gpu = x.cuda().requires_grad_()
        y = dropout_ext.dropout(on_gpu, P, key=key)
        (gradient,) = torch.autograd.grad(y, on_gpu, torch.ones_like(y))
        assert torch.equal(y.cpu(), dropout_ext.dropout(x, P, key=key)), f"{dtype}, {n}: output"
        ones = dropout_ext.dropout(torch.ones_like(x), P, key=key)
        assert torch.equal(gradient.cpu(), ones), f"{dtype}, {n}: gradient"


class Runner:
    """Times cases until the deadline; says once what it left out."""

    def __init__(self, emit, quick, deadline):
        self.emit, self.quick, self.deadline = emit, quick, deadline
        self.late, self.failed, self.left_out = [], [], []

    def attempt(self, what, function, *args):
        """A part that fails is noted and leaves the others alone."""
        try:
            function(*args)
        except Exception as error:
            traceback.print_exc()
            self.failed.append(what)
            self.emit({"note": f"{what}, GPU: FAILED ({type(error).__name__}: {error})"[:300]})
        self.emit({"step": what})

    def check_peer(self, side, check):
        """Leaves a peer out of all cases if it does not work, whatever the reason."""
        try:
            check()
        except Exception as error:
            self.left_out.append(side)
            self.emit({"note": f"{side.name} left out ({type(error).__name__}: {error})"[:300]})

    def out_of_time(self, what):
        if time.monotonic() < self.deadline:
            return False
        self.late.append(what)
        return True

    def contestants(self, case):
        """[(side, function, saved bytes)] of the sides that work here."""
        found = []
        for side in case.sides:
            if side in self.left_out:
                continue
            try:
                names = timing.namespace(case, side, "cuda")
                saved = None
                if case.needs_grad and side.role != "floor":
                    saved = timing.saved_bytes(case, names, side)
                run = function(case, side, names)
                run()
                torch.cuda.synchronize()
            except Exception as error:
                if side.role != "peer":
                    raise
                what = f"{case}, GPU: {side.name} left out ({type(error).__name__}: {error})"
                self.emit({"note": what[:300]})
                continue
            found.append((side, run, saved))
        return found

    def device(self, case):
        if self.out_of_time(str(case)):
            return
        size = getattr(torch, case.dtype).itemsize * case.elements
        # Input, gradient and output of every side at once, and the largest saved noise.
        per_side = 3 if case.needs_grad else 2
        needed = size * (per_side * len(case.sides) + 4)
        if needed > torch.cuda.mem_get_info()[0]:
            self.emit({"note": f"{case}, GPU: left out, needs {needed / Gi:.0f} GiB"})
            return
        contestants = self.contestants(case)
        rounds = 10 if self.quick else (40 if case.elements <= 64 * Mi else 12)
        calls = max(1, min(MOST_CALLS, BATCHED // case.elements))
        seconds = device_seconds([run for _, run, _ in contestants], rounds, calls)
        self.rows(case, contestants, seconds)
        del contestants
        torch.cuda.empty_cache()

    def rows(self, case, contestants, seconds):
        columns = [
            timing.Column(side, case.elements, None, saved) for side, _, saved in contestants
        ]
        for row in timing.rows(case, columns, seconds):
            self.emit({"row": row})


def bars(case):
    """The bars of one device case."""
    size = getattr(torch, case.dtype).itemsize * case.elements
    ours, torchs = cases.MODULE.name, cases.NN_MODULE.name
    found = [cases.Bar(torchs, ours, ">=", 1.0)]
    if case.op == "forward" and size >= 64 * Mi:
        found.append(cases.Bar(COPY.name, ours, ">=", 0.92))  # share of the copy's bandwidth
    if case.op != "forward" and case.dtype == "bfloat16" and case.elements >= 16 * Mi:
        found[0] = cases.Bar(torchs, ours, ">=", 1.2)
    return tuple(found)


def device_cases(quick):
    """The sizes that the bars are about first, then the rest."""
    large = (16 * Mi, 64 * Mi) if quick else (16 * Mi, 64 * Mi, 256 * Mi, Gi)
    small = (4 * Ki, Mi) if quick else (4 * Ki, 64 * Ki, Mi, 4 * Mi)
    for sizes in (large, small):
        for n in sizes:
            for dtype in DTYPES:
                for op in ("forward", "forward and backward"):
                    sides = (cases.NN_MODULE, cases.MODULE, COPY)
                    if n <= 256 * Mi:
                        sides += (TRITON,)
                    if n == 64 * Mi and (not quick or dtype == "bfloat16"):
                        sides += (COMPILED,)
                    case = Case("gpu", op, dtype, (n,), sides)
                    yield replace(case, bars=bars(case))


def host(runner):
    """Host time per call of small tensors."""
    for op in ("forward", "forward with grad", "forward and backward"):
        for n in (16, 4 * Ki):
            sides = (cases.NN_FUNCTION, cases.FUNCTION, TRITON)
            # The engine takes most of a backward's time on the host; the bar is for the call.
            bar = (cases.Bar(cases.FUNCTION.name, "F.dropout", "<=", 0.7),)
            label = f"host time, {op}, float32, {cases.size(n)}"
            case = Case(
                "gpu host",
                op,
                "float32",
                (n,),
                sides,
                label,
                bars=bar * (op != "forward and backward"),
            )
            contestants = runner.contestants(case)
            seconds = host_seconds([run for _, run, _ in contestants], 10 if runner.quick else 30)
            runner.rows(case, contestants, seconds)


def memory(emit):
    """Peak allocation of forward and backward above input and gradient."""
    import dropout_ext

    n = 64 * Mi
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.ones_like(x)
    sides = {
        "x * c": ("floor", lambda: x * (1 / (1 - P))),
        "F.dropout": ("torch", lambda: F.dropout(x, P)),
        "dropout_ext.dropout": ("ours", lambda: dropout_ext.dropout(x, P)),
    }
    peaks = {}
    for name, (role, forward) in sides.items():
        torch.autograd.grad(forward(), x, g)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(forward(), x, g)
        peaks[name] = torch.cuda.max_memory_allocated() - before
        common = {
            "section": "gpu memory",
            "case": "peak memory, forward and backward, bfloat16, 64 Mi",
            "op": "forward and backward",
            "dtype": "bfloat16",
            "elements": n,
            "p": P,
            "unit": "bytes",
        }
        row = {"side": name, "role": role, "metric": "peak memory", "p50": peaks[name]}
        emit({"row": common | row})
    over = peaks["dropout_ext.dropout"] - peaks["x * c"]
    bar = {"side": "dropout_ext.dropout - x * c", "role": "bar", "metric": "bar", "p50": over}
    emit({"row": common | bar | {"bar": "<= 1024", "met": over <= 1024}})


def independence(emit):
    """Do consecutive calls share random numbers? (ANCHORS: suspected of nn.Dropout, 16-bit types.)

    Elements come in vectors of eight. The second half of each vector in one call is compared with
    the first half in the next, and the calls as a whole: at p = 0.5 independent masks agree in half
    of the elements. The expected deviation is 0.5 / sqrt(elements compared).
    """
    import dropout_ext

    n = 2**24
    sides = {
        "nn.Dropout": ("torch", torch.nn.Dropout(0.5)),
        "dropout_ext.Dropout": ("ours", dropout_ext.Dropout(0.5)),
    }
    for dtype in ("bfloat16", "float16"):
        ones = torch.ones(n, device="cuda", dtype=getattr(torch, dtype))
        for name, (role, module) in sides.items():
            torch.manual_seed(1)
            a, b = (module(ones).ne(0).view(-1, 8) for _ in range(2))
            figures = {
                "second half, then first half": a[:, 4:] == b[:, :4],
                "first half, then second half": a[:, :4] == b[:, 4:],
                "same position": a == b,
            }
            for metric, agree in figures.items():
                share = agree.double().mean().item()
                z = (share - 0.5) / (0.5 / agree.numel() ** 0.5)
                row = {
                    "section": "gpu independence",
                    "case": f"consecutive calls, {dtype}",
                    "dtype": dtype,
                    "elements": n,
                    "p": 0.5,
                    "side": name,
                    "role": role,
                    "expected": 0.5,
                }
                emit({"row": row | {"metric": f"agreement, {metric}", "p50": share}})
                row |= {"metric": f"z of agreement, {metric}", "unit": "sigma", "p50": z}
                if role == "ours":
                    row |= {"bar": "within 5 sigma", "met": abs(z) <= 5}
                emit({"row": row})


def check_triton():
    from benchmarks import triton_dropout

    for dtype in DTYPES:
        triton_dropout.check(getattr(torch, dtype))


def run(emit, quick, device):
    deadline = time.monotonic() + float(os.environ.get("BENCH_SECONDS", "200")) * 0.6
    runner = Runner(emit, quick, deadline)
    emit({"total": 3 + len(list(device_cases(quick)))})
    for dtype in DTYPES:
        check(dtype)
    runner.check_peer(TRITON, check_triton)
    runner.attempt("independence", independence, emit)
    runner.attempt("memory", memory, emit)
    runner.attempt("host time", host, runner)
    for case in device_cases(quick):
        runner.attempt(str(case), runner.device, case)
    if runner.late:
        emit({"note": f"out of time, left out: {'; '.join(runner.late)}"})
    if runner.failed:
        raise RuntimeError(f"failed: {'; '.join(runner.failed)}")
