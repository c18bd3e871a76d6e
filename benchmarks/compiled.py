"""Dropout and its neighbours under torch.compile on the CPU: p = 0, nn.Dropout and ours.

Compiled afresh, whatever the caches have. Before a case is timed, ours is compared with eager code
under the same key.
"""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.cases import P
from benchmarks.timing import bar, interleave, quantiles, threads

SHAPE = (4096, 1024)
THREADS = 2
FASTER = 4

# Of dropout, that of the side, and the key that ours takes.
PATTERNS = {
    "dropout": lambda drop: lambda x, r, w, b, key: drop(x, key),
    "gelu, dropout": lambda drop: lambda x, r, w, b, key: drop(F.gelu(x), key),
    "dropout, add": lambda drop: lambda x, r, w, b, key: drop(x, key) + r,
    "dropout, add, layer_norm": lambda drop: (
        lambda x, r, w, b, key: F.layer_norm(drop(x, key) + r, x.shape[-1:], w, b)
    ),
}
# pattern, dtype, with backward, ours over p = 0 at most
CASES = [
    ("dropout", "float32", False, None),
    ("gelu, dropout", "float32", False, 1.30),
    ("gelu, dropout", "float32", True, 1.30),
    ("dropout, add", "float32", False, None),
    ("dropout, add, layer_norm", "float32", False, 1.35),
    ("dropout, add, layer_norm", "float32", True, 1.30),
    ("gelu, dropout", "bfloat16", False, None),
    ("dropout, add, layer_norm", "bfloat16", False, None),
]


def sides():
    """{name: (role, dropout of an input and a key)}"""
    import dropout_ext

    return {
        "compiled, p = 0": ("floor", lambda x, key: x),
        "compiled nn.Dropout": ("torch", lambda x, key: F.dropout(x, P)),
        "compiled dropout_ext": ("ours", lambda x, key: dropout_ext.dropout(x, P, key=key)),
    }


def check(function, compiled, inputs):
    """Raise AssertionError unless the compiled function drops and gives what eager code does."""
    got, want = compiled(*inputs), function(*inputs)
    assert torch.equal(got == 0, want == 0), "another mask"
    tolerance = 5e-2 if got.dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(got, want, rtol=tolerance, atol=tolerance), "wrong result"


def step(function, inputs, backward):
    leaves = [t for t in inputs if t.requires_grad]
    grad = torch.ones_like(inputs[0])

    def run():
        out = function(*inputs)
        if backward:
            torch.autograd.grad(out, leaves, grad, allow_unused=True)

    return run


def time_case(emit, pattern, dtype, backward, limit, rounds):
    import dropout_ext

    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_(backward)
        for shape in (SHAPE, SHAPE, SHAPE[-1:], SHAPE[-1:])
    ]
    inputs.append(dropout_ext.key(1))
    contestants = {}
    for side, (role, drop) in sides().items():
        torch.compiler.reset()
        function = PATTERNS[pattern](drop)
        compiled = torch.compile(function, dynamic=False)
        if role == "ours":
            check(function, compiled, inputs)
        contestants[side] = (role, step(compiled, inputs, backward))
        contestants[side][1]()
    op = "forward and backward" if backward else "forward"
    common = {
        "section": "compiled",
        "case": f"{pattern}: {op}, {dtype}, {'x'.join(map(str, SHAPE))}, {THREADS} threads",
        "op": op,
        "dtype": dtype,
        "shape": "x".join(map(str, SHAPE)),
        "p": P,
        "threads": THREADS,
    }
    seconds = interleave([run for _, run in contestants.values()], rounds, warmup=2)
    floor, theirs, ours = seconds.T
    for (side, (role, _)), taken in zip(contestants.items(), seconds.T, strict=True):
        row = common | {"side": side, "role": role, "metric": "time", "unit": "ns"}
        share = float(np.median(floor / taken))
        emit({"row": row | quantiles(taken * 1e9) | {"share_of_floor": share}})
    if limit is not None:
        price = quantiles(ours / floor)
        emit({"row": bar(common, "dropout_ext over p = 0", price, "<=", limit)})
    faster = quantiles(theirs / ours)
    emit({"row": bar(common, "nn.Dropout over dropout_ext", faster, ">=", FASTER)})


def run(emit, quick, device):
    if device != "cpu" or quick:  # a compilation takes seconds
        return
    emit({"total": len(CASES)})
    with threads(THREADS), torch.compiler.config.patch(force_disable_caches=True):
        for case in CASES:
            time_case(emit, *case, rounds=15)
            emit({"step": str(case)})
