"""A training step of whole models: the price of turning dropout on.

Four copies of a model with the same weights take turns: p = 0, torch's dropout, ours (converted and
overridden) and ours fused (`convert(fuse=True)`). A step is forward, loss, backward and an SGD
update. Peak memory is what the step allocates above what was allocated when it began, at its
highest.

The transformers here need no other package, for GPU machines without a network; those of zoo.py are
the ones that the tests train.
"""

import contextlib
import gc
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import zoo
from benchmarks.cases import P
from benchmarks.timing import bar, interleave, quantiles, threads


class Attention(nn.Module):
    """Multi-head attention that drops from the attention weights, as GPT-2 and BERT do."""

    def __init__(self, hidden, heads, p, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        batch, length, hidden = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if self.causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        mixed = self.drop(scores.softmax(-1)) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    """One layer: normalised before each half (GPT-2) or after it (BERT)."""

    def __init__(self, hidden, heads, p, gpt):
        super().__init__()
        self.gpt = gpt
        self.attention = Attention(hidden, heads, p, causal=gpt)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.drops = nn.ModuleList(nn.Dropout(p) for _ in range(2))

    def forward(self, x):
        halves = zip((self.attention, self.mlp), self.norms, self.drops, strict=True)
        for half, norm, drop in halves:
            x = x + drop(half(norm(x))) if self.gpt else norm(x + drop(half(x)))
        return x


class Transformer(nn.Module):
    """Embeddings, blocks and a head over the vocabulary, dropout where GPT-2 and BERT have it."""

    def __init__(self, vocabulary, hidden, layers, heads, length, p, gpt):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(length, hidden))
        self.drop = nn.Dropout(p)
        self.blocks = nn.Sequential(*(Block(hidden, heads, p, gpt) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids):
        x = self.drop(self.tokens(ids) + self.positions)
        return self.head(self.norm(self.blocks(x)))


def transformer(gpt, hidden, layers, heads, batch, length, vocabulary):
    def build(p):
        return Transformer(vocabulary, hidden, layers, heads, length, p, gpt)

    def inputs(device, dtype):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocabulary, (batch, length), generator=generator).to(device)

    def loss(model, ids):
        # Predict the token itself: only the work of a step matters here.
        return F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())

    return build, inputs, loss


def encoder(hidden, layers, heads, batch, length):
    def build(p):
        layer = nn.TransformerEncoderLayer(hidden, heads, dropout=p, batch_first=True)
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def inputs(device, dtype):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(batch, length, hidden, generator=generator).to(device, dtype)

    def loss(model, x):
        return model(x).float().square().mean()

    return build, inputs, loss


def from_zoo(name):
    model, sizes = zoo.MODELS[name], zoo.MEDIUM

    def inputs(device, dtype):
        x, labels = model.batch(sizes, 0)
        x = x.to(device, dtype if x.is_floating_point() else None)
        return x, labels.to(device)

    return lambda p: model.build(p, sizes), inputs, lambda m, batch: zoo.loss(m, *batch)


class Case(NamedTuple):
    name: str
    build: tuple  # a model of a probability, its inputs, its loss
    time: float | None = None  # fused over p = 0, at most
    memory: float | None = None
    compiled: float | None = None  # compiled each; fused below nn.Dropout too
    rounds: int = 11


GPT2, BERT, ENCODER = "GPT-2-like", "BERT-like", "nn.TransformerEncoder"
ZOO = {
    "BERT, sdpa": ("BERT of transformers, 4 x 256, batch 4 x 128", 1.02),
    "GPT-2, sdpa": ("GPT-2 of transformers, 4 x 256, batch 4 x 128", 1.05),
    "ViT, sdpa": ("ViT of transformers, 4 x 256, batch 4 x 129", 1.02),
    "LSTM, locked": ("LSTM 256 with LockedDropout, batch 4 x 128", 1.05),
    "convolutions": ("ConvNet 4 x 64 with Dropout2d and DropPath, batch 4 x 32 x 32", 1.05),
    "LoRA": ("LoRA 4 x 256, batch 4 x 128", 1.05),
}
MEMORY = 1.10
THREADS = 2  # on the CPU


def chosen(quick, device):
    if device == "cuda":
        gpt2 = transformer(True, 768, 12, 12, 8, 1024, 50257)
        bert = transformer(False, 768, 12, 12, 32, 512, 30522)
        yield Case(f"{GPT2}, 12 x 768, batch 8 x 1024", gpt2)
        yield Case(f"{BERT}, 12 x 768, batch 32 x 512", bert)
        return
    small = encoder(256, 4, 4, 8, 128)
    yield Case(f"{ENCODER}, 4 x 256, batch 8 x 128", small, 1.00, MEMORY, None if quick else 1.10)
    if quick:
        return
    wide = encoder(768, 2, 12, 4, 128)
    yield Case(f"{ENCODER}, 2 x 768, batch 4 x 128", wide, 1.00, MEMORY)
    for batch, length in ((2, 512), (1, 1024), (1, 2048)):
        longer = encoder(256, 4, 4, batch, length)
        yield Case(f"{ENCODER}, 4 x 256, batch {batch} x {length}", longer, rounds=5)
    yield Case(f"{GPT2}, 4 x 256, batch 4 x 128", transformer(True, 256, 4, 4, 4, 128, 1000))
    yield Case(f"{BERT}, 4 x 256, batch 4 x 128", transformer(False, 256, 4, 4, 4, 128, 1000))
    for name, (label, limit) in ZOO.items():
        yield Case(label, from_zoo(name), limit)


def variants(build, device, dtype):
    """{name: (role, model, context)} of the four copies."""
    import dropout_ext

    torch.manual_seed(0)
    base = build(P).to(device, dtype).train()
    off = build(0.0).to(device, dtype).train()
    off.load_state_dict(base.state_dict())
    return {
        "p = 0": ("floor", off, contextlib.nullcontext),
        "nn.Dropout": ("torch", base, contextlib.nullcontext),
        "dropout_ext": ("ours", zoo.ours(base), dropout_ext.override),
        "fused": ("fused", zoo.ours(base, fuse=True), dropout_ext.override),
    }


def step_of(model, loss, inputs, context):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    on_gpu = next(model.parameters()).is_cuda

    def step():
        optimizer.zero_grad()
        with context():
            loss(model, inputs).backward()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    return step


def peak_bytes(model, step, device):
    """Most bytes allocated at once during a step, above those at its start, without gradients."""
    model.zero_grad()
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes = [event.nbytes() for event in events]
    return int(max(0, np.cumsum(sizes).max())) if sizes else 0


def prices(emit, common, sides, steps, rounds, limit):
    """Times of a step and what they are over that at p = 0."""
    seconds = interleave(list(steps.values()), rounds, warmup=1)
    by_name = dict(zip(steps, seconds.T, strict=True))
    floor, theirs, _, fused = by_name.values()
    for side, (role, *_) in sides.items():
        row = common | {"side": side, "role": role}
        share = float(np.median(floor / by_name[side]))
        time = quantiles(by_name[side] * 1e9)
        emit({"row": row | {"metric": "time", "unit": "ns", **time, "share_of_floor": share}})
        if role != "floor":
            price = quantiles(by_name[side] / floor)
            emit({"row": row | {"metric": "time over p = 0", "unit": "ratio", **price}})
    if limit is not None:
        emit({"row": bar(common, "fused over p = 0", quantiles(fused / floor), "<=", limit)})
    return quantiles(fused / theirs)


def memory(emit, common, sides, steps, device, rounds, limit):
    # The profiler's clock puts a few events out of order, hence the median.
    peaks = {
        side: quantiles([peak_bytes(model, steps[side], device) / 2**20 for _ in range(rounds)])
        for side, (_, model, _) in sides.items()
    }
    for side, (role, *_) in sides.items():
        row = common | {"side": side, "role": role, "metric": "peak memory", "unit": "MiB"}
        emit({"row": row | peaks[side]})
    if limit is not None:
        over = quantiles([peaks["fused"]["p50"] / peaks["p = 0"]["p50"]])
        emit({"row": bar(common, "peak memory of fused over p = 0", over, "<=", limit)})


def compiled(emit, common, sides, loss, inputs, rounds, limit):
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        steps = {}
        for side, (_, model, context) in sides.items():
            steps[side] = step_of(torch.compile(model, dynamic=False), loss, inputs, context)
            steps[side]()
        common = common | {"case": f"{common['case']}, compiled"}
        over_theirs = prices(emit, common, sides, steps, rounds, limit)
    emit({"row": bar(common, "fused over nn.Dropout", over_theirs, "<=", 1)})
    torch.compiler.reset()


def run(emit, quick, device):
    import dropout_ext

    if not (hasattr(dropout_ext, "convert") and hasattr(dropout_ext, "override")):
        emit({"note": "models: left out, this dropout_ext has no convert and override"})
        return
    cases = list(chosen(quick, device))
    emit({"total": len(cases)})
    n_threads = THREADS if device == "cpu" else torch.get_num_threads()
    with threads(n_threads):
        for case in cases:
            run_case(emit, case, quick, device)
            emit({"step": case.name})


def run_case(emit, case, quick, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    build, make_inputs, loss = case.build
    try:
        sides = variants(build, device, dtype)
    except ImportError as error:
        emit({"note": f"models: {case.name} left out, {error}"})
        return
    inputs = make_inputs(device, dtype)
    steps = {
        side: step_of(model, loss, inputs, context) for side, (_, model, context) in sides.items()
    }
    common = {
        "section": "models",
        "case": case.name,
        "op": "step",
        "dtype": str(dtype)[6:],
        "p": P,
        "threads": torch.get_num_threads(),
        "environment": os.environ.get("BENCH_ENVIRONMENT"),
    }
    rounds = 4 if quick else case.rounds
    prices(emit, common, sides, steps, rounds, case.time)
    memory(emit, common, sides, steps, device, rounds // 2, case.memory)
    if case.compiled is not None:
        compiled(emit, common, sides, loss, inputs, rounds, case.compiled)
    del sides, steps
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
