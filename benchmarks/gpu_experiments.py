"""Experiments for a GPU that decide how the kernels are launched (docs/cuda.md has the list).

python -m benchmarks.gpu_experiments geometry   block sizes and persistent grids beside the default
python -m benchmarks.gpu_experiments compiled   compiled training steps, and what a mask repeats
"""

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import dropout_ext
from benchmarks.cases import Mi, P
from benchmarks.gpu import device_seconds
from benchmarks.timing import quantiles

# Blocks per multiprocessor: one pass over the tensor, or a grid that stays and loops.
RESIDENT = (0, 4, 8, 16)
THREADS = (64, 128, 256)


def geometry(rounds=20):
    force = dropout_ext._C._force_cuda_geometry
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    print("dtype elements threads blocks_per_multiprocessor us spread_us")
    for dtype in (torch.bfloat16, torch.float32):
        for n in (Mi, 16 * Mi, 64 * Mi):
            x = torch.randn(n, device="cuda", dtype=dtype)
            choices = [(threads, resident) for threads in THREADS for resident in RESIDENT]

            def call(threads, resident, x=x):
                force(resident * processors, threads, False)
                return dropout_ext.dropout(x, P)

            try:
                functions = [lambda c=choice, call=call: call(*c) for choice in choices]
                seconds = device_seconds(functions, rounds)
            finally:
                force(0, 0, False)
            for choice, column in zip(choices, seconds.T * 1e6, strict=True):
                q = quantiles(column)
                name = str(dtype).removeprefix("torch.")
                print(name, n, *choice, f"{q['p50']:.2f} {q['p80'] - q['p20']:.2f}")


def step(model, x):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()


def compiled(rounds=30):
    x = torch.randn(16, 512, 768, device="cuda")
    models = {}
    for name, p in (("p = 0", 0.0), ("nn.Dropout", P), ("dropout_ext", P)):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, p, batch_first=True, norm_first=True)
        model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).cuda()
        if name == "dropout_ext":
            dropout_ext.convert(model)
        models[name] = torch.compile(model)
        for _ in range(3):
            step(models[name], x)
    seconds = np.empty((rounds, len(models)))
    for r in range(rounds):
        for i, model in enumerate(models.values()):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(model, x)
            torch.cuda.synchronize()
            seconds[r, i] = time.perf_counter() - began
    print("compiled step, 4 x 768, batch 16 x 512, bfloat16: ms and ratio to p = 0")
    for name, column in zip(models, seconds.T, strict=True):
        ratio = quantiles(column / seconds[:, 0])["p50"]
        print(f"{name}: {quantiles(column * 1e3)['p50']:.3f} {ratio:.3f}")

    print("compiled mask of 2^22 elements, p = 0.5: runs of 64 decisions that occur twice (0),")
    print("largest |z| of the autocorrelation (below 7), where forward and backward differ (0)")
    for name, dropout in (("F.dropout", F.dropout), ("dropout_ext.dropout", dropout_ext.dropout)):
        ones = torch.ones(2**22, device="cuda", requires_grad=True)
        y = torch.compile(lambda x, dropout=dropout: dropout(x, 0.5))(ones)
        (gradient,) = torch.autograd.grad(y, ones, torch.ones_like(y))
        keep = y != 0
        differ = int((keep != (gradient != 0)).sum())
        print(f"{name}: {repeated_runs(keep)} {repetition(keep):.1f} {differ}")


def repeated_runs(keep):
    """Aligned runs of 64 decisions that are not the first of their kind."""
    shifts = torch.arange(64, device=keep.device)
    words = (keep.view(-1, 64).long() << shifts).sum(1)
    return len(words) - len(words.unique())


def repetition(keep):
    """The largest |z| of the agreement of a mask with itself, shifted cyclically."""
    signs = keep.double() * 2 - 1
    spectrum = torch.fft.rfft(signs)
    correlation = torch.fft.irfft(spectrum.abs().square(), n=signs.numel())[1:]
    return (correlation / signs.numel() ** 0.5).abs().max().item()


if __name__ == "__main__":
    experiments = {"geometry": geometry, "compiled": compiled}
    if len(sys.argv) != 2 or sys.argv[1] not in experiments:
        sys.exit(__doc__)
    experiments[sys.argv[1]]()
