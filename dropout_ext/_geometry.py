"""Where the elements of a tensor lie in a mask: mask strides, in the sense of docs/numerics.md."""

import operator
from collections.abc import Iterable, Sequence

import torch

from . import _reference

row_major = _reference.row_major


def wrap(index: int) -> int:
    """An index modulo 2**64 as the int64 of the same bits. A symbolic integer is already one."""
    return (index + 2**63) % 2**64 - 2**63 if type(index) is int else index


def wrap_offset(mask_offset: int) -> int:
    """The argument `mask_offset`, wrapped; TypeError if it is no integer."""
    try:
        return wrap(_int(mask_offset))
    except Exception:
        raise TypeError(
            f"dropout(): argument 'mask_offset' must be int, not {type(mask_offset).__name__}"
        ) from None


def mask_strides(
    shape: Sequence[int],
    broadcast_dims: Iterable[int] | None = None,
    strides: Iterable[int] | None = None,
    *,
    name: str = "broadcast_dims",
) -> list[int] | None:
    """Strides of the mask over `shape`: those given, or row-major over the shape with the shared
    dimensions set to 1, which get stride 0; None for plain row-major.

    name: what the caller of the public function knows `broadcast_dims` as.
    """
    if strides is not None:
        if broadcast_dims is not None:
            raise ValueError(
                "dropout(): arguments 'broadcast_dims' and 'mask_strides' exclude each other: "
                "shared dimensions have mask stride 0"
            )
        strides = ints(strides, "mask_strides")
        if len(strides) != len(shape):
            raise ValueError(
                f"dropout(): argument 'mask_strides' has {len(strides)} entries, but accepted "
                f"are one per dimension of the input, {len(shape)}"
            )
        return [wrap(stride) for stride in strides]
    if broadcast_dims is None:
        return None
    ndim = len(shape)
    shared = set()
    for dim in ints(broadcast_dims, name):
        if not -ndim <= dim < ndim:
            raise IndexError(
                f"dropout(): argument '{name}': Dimension out of range (expected to be in range of "
                f"[{-max(ndim, 1)}, {max(ndim, 1) - 1}], but got {dim})"
            )
        shared.add(dim % ndim)
    dense = row_major([1 if d in shared else size for d, size in enumerate(shape)])
    return [0 if d in shared else stride for d, stride in enumerate(dense)]


def ints(values: Iterable[int], name: str) -> list[int]:
    """`values`, the argument `name`, as integers; TypeError if they are none."""
    accepted, got = ("int", next(iter(values))) if name == "dim" else ("a sequence of ints", values)
    try:
        return [_int(value) for value in values]
    except Exception:
        raise TypeError(
            f"dropout(): argument '{name}' must be {accepted}, but got {got!r}"
        ) from None


def _int(value: int) -> int:
    """A tensor of one element becomes an int: as an element of a set it is equal to no other."""
    if isinstance(value, bool):
        raise TypeError
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)
