"""Independence between masks: consecutive calls, neighbouring keys, ranks, threads."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise

import torch

from benchmarks.stats import bits, result

SHIFTS = range(-64, 65)  # an overlap shows as a correlation of i with i + shift, not with i
P = 0.5
M64 = 2**64 - 1


def _bases(count):
    """Unrelated keys, multiples of the golden ratio."""
    return [
        (i * 0x9E3779B97F4A7C15 & M64, (i * 0xD1B54A32D192ED03 & M64) >> 3)
        for i in range(1, count + 1)
    ]


def _over_shifts(test, pairs, n):
    z = bits.crossed(pairs, SHIFTS, P)
    samples = n * len(pairs)
    labels = [f"shift {shift}" for shift in SHIFTS]
    return result.normal("keys", test, P, samples, z, samples**-0.5, "correlation", labels=labels)


def between(subject, size):
    n, count = size.pair, size.keys
    for seed, dtype in ((7, torch.float32), (8, torch.bfloat16)):
        masks = subject.calls(P, n, count, seed, dtype)
        name = "consecutive calls" + (", bfloat16" if dtype == torch.bfloat16 else "")
        yield _over_shifts(name, list(pairwise(masks)), n)
        if subject.call is None:
            break

    bases = _bases(count)
    neighbours = {"seed + 1": (1, 0), "seed + 2^32": (2**32, 0)}
    if subject.name != "nn.Dropout":
        neighbours |= {"offset + 1": (0, 1), "offset + 2^32": (0, 2**32)}
    masks = [subject.bits(base, P, n) for base in bases]
    for name, (seed, offset) in neighbours.items():
        others = [
            subject.bits((base[0] + seed & M64, base[1] + offset & M64), P, n) for base in bases
        ]
        yield _over_shifts(f"key {name}", list(zip(masks, others, strict=True)), n)
    yield _flips(subject, size.flips, bases[0])

    ranks, steps = 16, 4
    of_step = [
        [subject.bits(subject.rank_key(bases[1], step, rank), P, n) for rank in range(ranks)]
        for step in range(steps)
    ]
    pairs = list(combinations(range(ranks), 2))
    z = [bits.crossed([(masks[a], masks[b]) for masks in of_step], [0], P)[0] for a, b in pairs]
    yield result.normal(
        "keys", "ranks, all pairs", P, steps * n * len(pairs), z, (steps * n) ** -0.5,
        "correlation", labels=[f"ranks {a}, {b}" for a, b in pairs],
    )  # fmt: skip
    neighbours = [pair for masks in of_step for pair in pairwise(masks)]
    yield _over_shifts("ranks, neighbours", neighbours, n)
    consecutive = [pair for a, b in pairwise(of_step) for pair in zip(a, b, strict=True)]
    yield _over_shifts("steps of a rank", consecutive, n)
    if subject.call is not None:
        yield from _threads(subject, size)


def _flips(subject, n, base):
    """Every single bit of the key."""
    mask, z, labels = subject.bits(base, P, n), [], []
    for word, name in enumerate(("seed", "offset")):
        if name == "offset" and subject.name == "nn.Dropout":
            continue
        for bit in range(64):
            key = list(base)
            key[word] ^= 1 << bit
            z += bits.crossed([(mask, subject.bits(tuple(key), P, n))], [0], P)
            labels.append(f"{name} bit {bit}")
    samples = n * len(z)
    return result.normal(
        "keys", "one bit of the key", P, samples, z, n**-0.5, "correlation", labels=labels
    )


def _threads(subject, size):
    n = size.mask
    before = torch.get_num_threads()
    x = torch.ones(min(n, 2**22))
    try:
        torch.set_num_threads(1)
        alone = subject.apply(x, P, (40, 1))
        counts, differences = (2, 3, 4, 7), 0
        for threads in counts:
            torch.set_num_threads(threads)
            differences += int((subject.apply(x, P, (40, 1)) != alone).sum())
    finally:
        torch.set_num_threads(before)
    yield result.exact(
        "keys", "2, 3, 4, 7 threads against 1", P, len(counts) * x.numel(), differences
    )
    mask = bits.pack(alone == 0)
    lags = [x.numel() // threads // 8 * 8 for threads in counts]
    yield result.normal(
        "keys", "between the parts of threads", P, x.numel(), bits.lagged(mask, lags, P),
        (2 / x.numel()) ** 0.5, "correlation", labels=[f"1/{threads}" for threads in counts],
    )  # fmt: skip

    # The draw of a key is atomic, so the set of masks does not depend on who draws when.
    with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(4) as pool:
        torch.manual_seed(11)
        masks = list(pool.map(lambda _: subject.call(P, size.flips), range(32)))
    masks.sort(key=lambda mask: mask.tobytes())
    pairs = list(combinations(masks, 2))
    z = [bits.crossed([pair], [0], P)[0] for pair in pairs]
    yield result.normal(
        "keys", "calls of 4 threads, all pairs", P, size.flips * len(pairs), z, size.flips**-0.5,
        "correlation",
    )  # fmt: skip
