"""Attention with dropout on the CPU beside PyTorch's, forward and backward, and in encoder layers.

The sides of a case take turns: PyTorch's flash kernel at p = 0, PyTorch at p = 0.1, which has no
fused kernel there, and ours. Before they are timed, ours is compared with the formula under the
mask of its key.
"""

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.cases import P
from benchmarks.models import encoder, peak_bytes, step_of, variants
from benchmarks.timing import bar, interleave, quantiles, threads

LONG = 1024  # from here on PyTorch at p = 0.1 is held to be far behind

# shape, dtype, causal, threads, ours over PyTorch at p = 0 at most
CALLS = [
    ((1, 4, 2048, 64), "float32", False, 1, 1.15),
    ((1, 2, 4096, 64), "float32", False, 1, 1.15),
    ((1, 4, 2048, 64), "bfloat16", False, 1, 1.25),
    ((1, 2, 4096, 64), "bfloat16", False, 1, 1.25),
] + [
    (shape, "float32", causal, n, 1.25)
    for shape in ((8, 4, 128, 64), (2, 4, 1024, 64))
    for causal in (False, True)
    for n in (1, 2)
]
# batch, length, price of dropout in an encoder of 2 layers at most
ENCODERS = [(8, 128, 1.06), (4, 512, 1.06), (2, 1024, 1.10), (1, 2048, 1.15)]
FASTER = 3.5
MEMORY = 1.2


def check(shape, dtype, causal):
    """Raise AssertionError unless ours is the formula under the mask of its key."""
    import dropout_ext

    shape = (1, shape[1], min(shape[2], 256), shape[3])  # the formula takes a matrix
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    key = dropout_ext.key(1)
    query, k, value = (t.double() for t in tensors)
    scores = query @ k.transpose(-2, -1) * shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) > 0, -torch.inf)
    keep = dropout_ext.keep_mask(scores.shape, P, key)
    want = torch.where(keep, scores.softmax(-1) / (1 - P), 0) @ value
    attention = dropout_ext.functional.scaled_dot_product_attention
    got = attention(*tensors, dropout_p=P, is_causal=causal, dropout_key=key)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(got.double(), want, rtol=tolerance, atol=tolerance), "wrong attention"


def sides(shape, dtype, causal):
    """{name: (role, what runs forward and backward)}"""
    import dropout_ext

    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape, generator=generator).to(dtype)

    def step(function, p):
        def run():
            out = function(*tensors, dropout_p=p, is_causal=causal)
            torch.autograd.grad(out, tensors, grad)

        return run

    theirs, ours = (
        F.scaled_dot_product_attention,
        dropout_ext.functional.scaled_dot_product_attention,
    )
    return {
        "torch, p = 0": ("floor", step(theirs, 0.0)),
        f"torch, p = {P}": ("torch", step(theirs, P)),
        "dropout_ext": ("ours", step(ours, P)),
    }


def time_calls(emit, shape, dtype, causal, n_threads, limit, rounds):
    torch_dtype = getattr(torch, dtype)
    check(shape, torch_dtype, causal)
    contestants = sides(shape, torch_dtype, causal)
    name = f"attention {'x'.join(map(str, shape))}, {dtype}"
    name += ", causal" * causal + f", {n_threads} threads" * (n_threads > 1)
    common = {
        "section": "attention",
        "case": name,
        "op": "forward and backward",
        "dtype": dtype,
        "shape": "x".join(map(str, shape)),
        "p": P,
        "threads": n_threads,
    }
    with threads(n_threads):
        seconds = interleave([run for _, run in contestants.values()], rounds, warmup=1)
    flash, theirs, ours = seconds.T
    for (side, (role, _)), taken in zip(contestants.items(), seconds.T, strict=True):
        row = common | {"side": side, "role": role, "metric": "time", "unit": "ns"}
        share = float(np.median(flash / taken))
        emit({"row": row | quantiles(taken * 1e9) | {"share_of_floor": share}})
    emit(
        {"row": bar(common, "dropout_ext over torch, p = 0", quantiles(ours / flash), "<=", limit)}
    )
    if shape[2] >= LONG:
        faster = quantiles(theirs / ours)
        emit({"row": bar(common, f"torch, p = {P} over dropout_ext", faster, ">=", FASTER)})


def peak_memory(emit, shape, rounds):
    contestants = sides(shape, torch.float32, False)
    common = {
        "section": "attention",
        "case": f"attention {'x'.join(map(str, shape))}, memory",
        "op": "forward and backward",
        "dtype": "float32",
        "shape": "x".join(map(str, shape)),
        "p": P,
        "threads": torch.get_num_threads(),
    }
    peaks = {}
    for side, (role, run) in contestants.items():
        peaks[side] = [peak_bytes(torch.nn.Identity(), run, "cpu") / 2**20 for _ in range(rounds)]
        row = common | {"side": side, "role": role, "metric": "peak memory", "unit": "MiB"}
        emit({"row": row | quantiles(peaks[side])})
    ratio = quantiles(np.divide(peaks["dropout_ext"], peaks["torch, p = 0"]))
    emit({"row": bar(common, "dropout_ext over torch, p = 0", ratio, "<=", MEMORY)})


def time_encoder(emit, batch, length, limit, rounds):
    build, make_inputs, loss = encoder(256, 2, 4, batch, length)
    copies = variants(build, "cpu", torch.float32)
    inputs = make_inputs("cpu", torch.float32)
    steps = [step_of(model, loss, inputs, context) for _, model, context in copies.values()]
    common = {
        "section": "attention",
        "case": f"nn.TransformerEncoder, 2 x 256, batch {batch} x {length}",
        "op": "step",
        "dtype": "float32",
        "p": P,
        "threads": torch.get_num_threads(),
    }
    seconds = interleave(steps, rounds, warmup=1)
    floor, _, ours, _ = seconds.T
    for (side, (role, *_)), taken in zip(copies.items(), seconds.T, strict=True):
        row = common | {"side": side, "role": role, "metric": "time", "unit": "ns"}
        share = float(np.median(floor / taken))
        emit({"row": row | quantiles(taken * 1e9) | {"share_of_floor": share}})
    emit({"row": bar(common, "dropout_ext over p = 0", quantiles(ours / floor), "<=", limit)})


def run(emit, quick, device):
    import dropout_ext

    if device != "cpu" or not hasattr(dropout_ext.functional, "scaled_dot_product_attention"):
        emit({"note": "attention: left out, this dropout_ext has none for this device"})
        return
    calls, encoders = (CALLS[4::4], ENCODERS[:1]) if quick else (CALLS, ENCODERS)
    emit({"total": len(calls) + len(encoders) + 1})
    rounds = 3 if quick else 7
    for call in calls:
        time_calls(emit, *call, rounds)
        emit({"step": str(call)})
    for batch, length, limit in encoders:
        time_encoder(emit, batch, length, limit, rounds)
        emit({"step": f"{batch} x {length}"})
    length = 1024 if quick else 4096
    peak_memory(emit, (1, 2, length, 64), rounds)
    emit({"step": "memory"})
