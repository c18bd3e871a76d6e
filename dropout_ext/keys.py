"""Keys: two 64-bit words (seed, offset) that decide a whole mask. Ordinary tensors, uint64 of shape
(2,), in the layout of PyTorch's own stateless keys.
"""

import torch
from torch import Tensor

from . import _ops


def _check_word(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"key(): argument '{name}' must be int, not {type(value).__name__}")
    if not 0 <= value < 2**64:
        raise ValueError(
            f"key(): argument '{name}' is {value}, but accepted are integers from 0 to 2**64 - 1"
        )
    return value


def key(seed: int, offset: int = 0, device: torch.device | str | None = None) -> Tensor:
    """The key (seed, offset): a uint64 tensor of shape (2,).

    Both words are integers from 0 to 2**64 - 1; ValueError otherwise. A key on the CPU serves
    tensors on every device.
    """
    words = [_check_word("seed", seed), _check_word("offset", offset)]
    # By way of int64: inductor has no constants of type uint64.
    signed = [word - 2**64 if word >= 2**63 else word for word in words]
    return torch.tensor(signed, dtype=torch.int64, device=device).view(torch.uint64)


def _check_types(function: str, key: Tensor, n: int) -> None:
    if not isinstance(key, Tensor):
        raise TypeError(
            f"{function}(): argument 'key' must be a Tensor (dropout_ext.key makes one), "
            f"not {type(key).__name__}"
        )
    if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool):
        raise TypeError(f"{function}(): argument 'n' must be int, not {type(n).__name__}")


def fold_in(key: Tensor, n: int) -> Tensor:
    """An independent key for step, rank or slice `n`, as jax.random.fold_in derives one.

    key: shape (2,), or (..., 2) for many keys at once; the result has its shape, dtype and device.
    n: an integer from 0 to 2**63 - 1.

    Do not count steps in a key's offset and ranks by `fold_in`: the counter is offset + n, so the
    two would meet. `fold_in(fold_in(key, step), rank)` is right.
    """
    _check_types("fold_in", key, n)
    if isinstance(n, int) and n >= 2**63:
        raise ValueError(
            f"fold_in(): argument 'n' is {n}, but accepted are integers from 0 to 2**63 - 1"
        )
    return _ops.ops.fold_in(key, n)


def split(key: Tensor, n: int) -> Tensor:
    """`n` independent keys, (n, 2): row j is `fold_in(key, j)`. key: shape (2,)."""
    _check_types("split", key, n)
    return _ops.ops.split(key, n)
