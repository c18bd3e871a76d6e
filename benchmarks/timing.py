"""Check a case, then time its sides in turn; quantiles and ratios of what was measured."""

import timeit
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.cases import Side

SEED = 20  # of the check before the timing


def quantiles(values):
    p20, p50, p80 = np.quantile(np.asarray(values, dtype=float), (0.2, 0.5, 0.8))
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80), "rounds": len(values)}


@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def namespace(case, side, device="cpu"):
    """The variables of a side's statement, after its set-up."""
    import dropout_ext

    shape = side.shape or case.shape
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    # Only random numbers that fit the cache are drawn; a 64 Mi tensor repeats them.
    n = int(np.prod(shape))
    x = torch.randn(min(n, 2**20 + 1), generator=generator, device=device).to(dtype)
    x = x.repeat(-(-n // x.numel()))[:n].reshape(shape)
    names = {
        "torch": torch,
        "F": F,
        "dropout_ext": dropout_ext,
        "p": case.p,
        "c": 1 / (1 - case.p),
        "x": x,
        "generator": generator,
    }
    exec(side.setup, names)
    if case.needs_grad:
        names["x"].requires_grad_()
        names["g"] = torch.ones_like(x)
    return names


@lru_cache(maxsize=2)
def checked_mask(shape, p):
    """The keep mask of a call seeded with SEED, checked against the plain PyTorch reference.

    The reference is slow, so windows at the start, the middle and the end stand for large masks.
    The key is the complement of two draws of torch.randint (docs/numerics.md).
    """
    import dropout_ext
    from dropout_ext import _reference

    generator = torch.Generator().manual_seed(SEED)
    words = [int(torch.randint(0, 2**63 - 1, (1,), generator=generator)) for _ in range(2)]
    key = torch.tensor([~word for word in words]).view(torch.uint64)
    keep = dropout_ext.keep_mask(shape, p, key)
    flat = keep.flatten()
    window = min(len(flat), 2**16)
    for start in {0, (len(flat) - window) // 2, len(flat) - window}:
        want = _reference.keep_mask(key, p, (window,), (1,), start)
        assert torch.equal(flat[start : start + window], want), f"keep_mask, {shape}: wrong mask"
    return keep


def expected(case, side, x, keep):
    """What the contract says that the output is, in the arithmetic that it names."""
    if side.formula == "alpha":
        alpha = -1.7580993408473766  # -scale * alpha of SELU
        a = ((1 - case.p) * (1 + case.p * alpha**2)) ** -0.5
        return torch.where(keep, a * x.double() + -a * case.p * alpha, a * (1 - case.p) * alpha)
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    scale = torch.tensor(1 / (1 - case.p), dtype=wide)
    return torch.where(keep, (x.to(wide) * scale).to(x.dtype), torch.zeros((), dtype=x.dtype))


def check(case, side):
    """Raise AssertionError unless output and gradient of our side are those of the reference."""
    if "grad(" in side.expr:  # the forward before it is another case's
        return
    names = namespace(case, side)
    x = names["x"].detach()
    shape = tuple(1 if d in side.shared else n for d, n in enumerate(x.shape))
    keep = checked_mask(shape, case.p).expand(x.shape)
    if side.reference:
        check_against(case, side, names | {"keep": keep})
        return
    want = expected(case, side, x, keep)
    torch.manual_seed(SEED)
    y = eval(side.expr, names)
    exact = side.formula == "scale"
    same = torch.equal(y, want) if exact else torch.allclose(y.double(), want, atol=1e-6)
    assert same, f"{case}: {side.name} differs from the reference"
    if case.op == "forward and backward":
        (grad,) = torch.autograd.grad(y, names["x"], names["g"])
        assert torch.equal(grad, expected(case, side, names["g"], keep)), f"{case}: wrong gradient"


def check_against(case, side, names):
    want = eval(side.reference, names)
    torch.manual_seed(SEED)
    y = eval(side.expr, names).double()
    places = 8 * torch.finfo(names["x"].dtype).eps
    same = torch.allclose(y, want, rtol=places, atol=places)
    assert same, f"{case}: {side.name} differs from the reference"


def saved_bytes(case, names, side):
    """Bytes that autograd keeps for backward beside the input, each storage counted once."""
    kept = {}
    own = names["x"].untyped_storage().data_ptr()

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() != own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = eval(side.expr, names)
    del output
    return sum(kept.values())


@dataclass
class Column:
    """What the rows say of a side beside its times."""

    side: Side
    elements: int
    threads: int | None
    saved: int | None


class Contestant(Column):
    """A side that is ready to run: `timer.timeit(loops)` on `threads` threads."""

    def __init__(self, case, side, block):
        names = namespace(case, side)
        saved = saved_bytes(case, names, side) if case.needs_grad else None
        super().__init__(side, names["x"].numel(), side.threads or case.threads, saved)
        self.timer = timeit.Timer(case.statement(side), globals=names)
        torch.set_num_threads(self.threads)
        once = self.timer.timeit(1)
        if once < 0.1:  # else the first call tells enough
            once = self.timer.timeit(1)
        loops = max(1, int(block / once))
        if loops > 1:
            once = self.timer.timeit(loops) / loops
            loops = max(1, int(block / once))
        self.loops, self.seconds = loops, once


def prepare(case, quick):
    """Contestants, the number of rounds that fits the case's time, and notes on what was left out.

    One round runs every side once; a block of repetitions takes about a millisecond.
    """
    contestants, notes = [], []
    for side in case.sides:
        try:
            contestants.append(Contestant(case, side, block=5e-4 if quick else 1e-3))
        except Exception as error:
            if not side.optional:
                raise
            notes.append(f"{case}: {side.name} left out ({type(error).__name__}: {error})"[:300])
    budget = 0.15 if quick else 0.4
    per_round = sum(c.seconds * c.loops for c in contestants)
    least = 3 if quick else (7 if per_round < 0.3 else 5)
    rounds = int(min(100, max(least, budget / per_round)))
    return contestants, rounds, notes


def rows(case, columns, seconds):
    """CSV rows from `seconds` per call: one line per round, one column per side."""
    common = {
        "section": case.section,
        "case": str(case),
        "op": case.op,
        "dtype": case.dtype,
        "shape": "x".join(map(str, case.shape)),
        "p": case.p,
        "threads": case.threads,
        "environment": case.environment,
    }
    itemsize = getattr(torch, case.dtype).itemsize
    per_element = {c.side.name: seconds[:, i] / c.elements for i, c in enumerate(columns)}
    floor = next((c.side.name for c in columns if c.side.role == "floor"), None)
    ours = next((c.side.name for c in columns if c.side.role == "ours"), None)
    for i, c in enumerate(columns):
        name = c.side.name
        row = common | {
            "side": name,
            "role": c.side.role,
            "elements": c.elements,
            "threads": c.threads,
        }
        yield row | {
            "metric": "time",
            "unit": "ns",
            **quantiles(seconds[:, i] * 1e9),
            "bytes_moved": 2 * itemsize * case.passes * c.elements,
            "share_of_floor": float(np.median(per_element[floor] / per_element[name]))
            if floor
            else None,
        }
        if c.saved is not None:
            yield row | {
                "metric": "saved for backward",
                "unit": "bytes",
                "p50": c.saved,
                "bar": "<= 16" if c.side.role == "ours" else None,
                "met": c.saved <= 16 if c.side.role == "ours" else None,
            }
        if ours and name != ours:
            yield row | {
                "metric": f"time over {ours}",
                "unit": "ratio",
                **quantiles(per_element[name] / per_element[ours]),
            }
    for bar in case.bars:
        ratio = quantiles(per_element[bar.of] / per_element[bar.over])
        yield common | {
            "elements": case.elements,
            "side": f"{bar.of} over {bar.over}",
            "role": "bar",
            "metric": "bar",
            "unit": "ratio",
            **ratio,
            "bar": str(bar),
            "met": bar.met(ratio["p50"]),
        }


def interleave(functions, rounds, warmup=2):
    """Seconds of each of `functions` per round, called in turn; the order turns with the round."""
    for _ in range(warmup):
        for function in functions:
            function()
    seconds = np.empty((rounds, len(functions)))
    for r in range(rounds):
        for k in range(len(functions)):
            i = (k + r) % len(functions)
            seconds[r, i] = timeit.timeit(functions[i], number=1)
    return seconds


def bar(common, side, figure, sense, limit):
    """A CSV row that says whether a ratio meets its bar."""
    met = figure["p50"] <= limit if sense == "<=" else figure["p50"] >= limit
    return common | {
        "side": side,
        "role": "bar",
        "metric": "bar",
        "unit": "ratio",
        **figure,
        "bar": f"{sense} {limit:g}",
        "met": met,
    }
