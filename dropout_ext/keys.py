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
    """The key (seed, offset), which decides a whole mask: the same on every device.

    Args:
        seed (int): from 0 to 2**64 - 1.
        offset (int): from 0 to 2**64 - 1. Default: 0
        device (torch.device or str, optional): of the result; a key on the CPU serves tensors on
            every device. Default: None, torch's default device

    Returns:
        Tensor: uint64 of shape (2,).

    Raises:
        ValueError: a seed or an offset out of range.
        TypeError: one that is no int.

    Example:
        >>> dropout_ext.key(seed=42)
        tensor([42,  0], dtype=torch.uint64)
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

    Do not count steps in a key's offset and ranks by `fold_in`: the counter is offset + n, so the
    two would meet. `fold_in(fold_in(key, step), rank)` is right.

    Args:
        key (Tensor): uint64 or int64 of shape (2,), or (..., 2) for many keys at once.
        n (int): from 0 to 2**63 - 1.

    Returns:
        Tensor: of the shape, dtype and device of `key`.

    Raises:
        ValueError: a key of another shape, `n` out of range.
        TypeError: an argument of another type or dtype.

    Example:
        >>> k = dropout_ext.key(seed=42)
        >>> dropout_ext.fold_in(dropout_ext.fold_in(k, 7), 3).shape  # for rank 3 in step 7
        torch.Size([2])
    """
    _check_types("fold_in", key, n)
    if isinstance(n, int) and n >= 2**63:
        raise ValueError(
            f"fold_in(): argument 'n' is {n}, but accepted are integers from 0 to 2**63 - 1"
        )
    return _ops.ops.fold_in(key, n)


def split(key: Tensor, n: int) -> Tensor:
    """`n` independent keys: row j is `fold_in(key, j)`.

    Args:
        key (Tensor): uint64 or int64 of shape (2,).
        n (int): how many, from 0.

    Returns:
        Tensor: of shape (n, 2), of the dtype and device of `key`.

    Raises:
        ValueError: a key of another shape, a negative `n`.
        TypeError: an argument of another type or dtype.

    Example:
        >>> dropout_ext.split(dropout_ext.key(seed=42), 3).shape
        torch.Size([3, 2])
    """
    _check_types("split", key, n)
    return _ops.ops.split(key, n)
