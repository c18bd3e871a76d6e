"""`python -m dropout_ext`: versions, how the extension was built, and a check of the mask
contract's known answers on what this machine has. Exit status 1 if one fails.
"""

import platform
import sys
from collections.abc import Iterator

import torch

from . import _C, _reference, build_info, fold_in, functional, fused, key

# From docs/numerics.md.
KEY = (42, 0)
WORDS = (0x9CEAF053, 0x77F5493B, 0x12BF50AD, 0x5742B3D7, 0xF0539CEA, 0x493B77F5, 0x50AD12BF)
FAR_INDEX, FAR_WORDS = 2**35 + 5, (0xE0229807, 0xFA3F5419, 0x5A2DC8FA)
FOLDED = (0x77F5493B9CEAF053, 0x5742B3D712BF50AD)
KEPT = {(42, 0, 0.5): 0xC27FA8027C8A6891, (42, 1, 0.1): 0xFFEFFFEDFFEFFF7F}


def checks() -> Iterator[tuple[str, bool]]:
    """Names and outcomes."""
    yield "words", [_C.element_word(*KEY, i) for i in range(len(WORDS))] == list(WORDS)
    far = [_C.element_word(*KEY, FAR_INDEX + i) for i in range(len(FAR_WORDS))]
    yield "words beyond 2^32 blocks", far == list(FAR_WORDS)
    yield "fold_in", fold_in(key(*KEY), 0).tolist() == list(FOLDED)
    devices = ["cpu"]
    if build_info()["cuda"] and torch.cuda.is_available():
        devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for (seed, offset, p), bits in KEPT.items():
        k = key(seed, offset)
        want = torch.tensor([bits >> i & 1 for i in range(64)], dtype=torch.bool)
        yield f"keep bits, p={p}, reference", _reference.keep_mask(k, p, (64,)).equal(want)
        for device in devices:
            mask = functional.keep_mask((64,), p, k, device=device)
            yield f"keep bits, p={p}, {device}", mask.cpu().equal(want)
            out = functional.dropout(torch.ones(64, device=device), p, key=k)
            yield f"dropout, p={p}, {device}", (out.cpu() != 0).equal(want)
            ones = torch.ones(1, 64, device=device)
            norm, out = fused.dropout_add_layer_norm(ones, ones, 64, p=p, key=k, return_sum=True)
            yield (
                f"dropout_add_layer_norm, p={p}, {device}",
                (
                    (out.cpu()[0] != 1).equal(want)
                    and torch.allclose(norm, torch.nn.functional.layer_norm(out, (64,)), atol=1e-5)
                ),
            )


def main() -> int:
    info = build_info()
    print(f"dropout_ext {info['version']}, mask contract {info['mask_contract']}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"built for torch {info['torch']} by {info['compiler']}; tested: {info['torch_tested']}")
    cuda = f"{info['cuda_version']} for {', '.join(info['cuda_archs'])}" if info["cuda"] else "no"
    print(f"CUDA: {cuda}")
    print(f"CPU: {info['cpu_variant']}, of {', '.join(info['cpu_variants'])}")
    failed = 0
    for name, passed in checks():
        failed += not passed
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
