"""DTensor: each rank computes its part of the whole tensor's mask, so that the result does not
depend on the mesh or on the placements.
"""

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from . import _call, _draw, _geometry
from ._call import Call


def run(input: DTensor, call: Call) -> Tensor:
    """The mask of the whole tensor, each shard of it computed where it lies."""
    strides = call.mask_strides or _geometry.row_major(input.shape)
    key = call.key
    if _call.is_dtensor(key):
        # Not every backend sends uint64.
        words: Any = key.view(torch.int64) if key.dtype == torch.uint64 else key
        key = words.full_tensor()
        call = call._replace(key=key)
    # Of the whole: every rank errs or none, before anything is drawn or sent.
    check_placements(input, call.inplace)
    _call.check(input, call)
    if torch.compiler.is_dynamo_compiling() and key is not None and key.dim() == 2:
        check_batched_key(input, key)
    if input.device_mesh.get_coordinate() is None:
        return input  # a rank that has no part in the tensor
    whole, begin, size = localize(input)
    if key is None and call.p < 1:
        key = agree(_draw.draw_key(input, call.generator), input)
    elif key is not None and key.dim() == 2:
        key = key.narrow(0, begin[0], size[0])
    offset = call.mask_offset + sum(at * step for at, step in zip(begin, strides, strict=True))
    shard = call._replace(
        inplace=False, key=key, generator=None, mask_strides=strides, mask_offset=offset
    )
    out = wrap(_call.run(whole.to_local(), shard), whole)
    return input.copy_(out) if call.inplace else out


def check_batched_key(input: DTensor, key: Tensor) -> None:
    if key.size(0) != input.size(0):
        raise ValueError(
            f"dropout(): argument 'key' has shape {tuple(key.shape)}, but accepted are (2,) and, "
            f"for one key per slice of dimension 0, ({input.size(0)}, 2)"
        )


def check_placements(input: DTensor, inplace: bool) -> None:
    for placement in input.placements:
        if placement.is_partial():
            if inplace:
                raise ValueError(
                    f"dropout(): argument 'inplace' is True, but argument 'input' has placement "
                    f"{placement!r}, whose parts cannot be dropped in place: "
                    "redistribute it first, or pass inplace=False"
                )
        elif not (placement.is_replicate() or placement.is_shard()):
            raise NotImplementedError(
                f"dropout(): argument 'input' has placement {placement!r}, but accepted are Shard, "
                "Replicate and Partial: redistribute it first"
            )


def localize(input: DTensor) -> tuple[DTensor, list[int], list[int]]:
    """`input` without partial sums, and where its local shard begins and how long it is, per
    dimension.
    """
    placements: list[Any] = [Replicate() if p.is_partial() else p for p in input.placements]
    if any(p.is_partial() for p in input.placements):
        input = input.redistribute(placements=placements)
    mesh, begin, size = input.device_mesh, [0] * input.dim(), list(input.shape)
    for mesh_dim, placement in enumerate(placements):
        if placement.is_replicate():
            continue
        # As torch.chunk splits.
        dim = placement.dim
        chunk = -(-size[dim] // mesh.size(mesh_dim))
        first = min(mesh.get_local_rank(mesh_dim) * chunk, size[dim])
        begin[dim] += first
        size[dim] = min(chunk, size[dim] - first)
    if not torch.compiler.is_dynamo_compiling() and input.to_local().shape != tuple(size):
        raise ValueError(
            f"dropout(): argument 'input' has a shard of shape {tuple(input.to_local().shape)}, "
            f"but accepted are shards as distribute_tensor makes them, here of {tuple(size)}"
        )
    return input, begin, size


def wrap(local: Tensor, like: DTensor) -> DTensor:
    """`local`, laid out as torch.empty_like would, as a part of a tensor like `like`."""
    layout = torch.empty_strided(like.shape, like.stride(), device="meta")
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=torch.empty_like(layout).stride(),
    )


def agree(key: Tensor, input: DTensor) -> Tensor:
    """The key that the first rank of the mesh drew, as int64 on every rank."""
    key = key.view(torch.int64).to(input.device)  # not every backend sends uint64
    for mesh_dim in range(input.device_mesh.ndim):
        key = collectives.broadcast(key, 0, (input.device_mesh, mesh_dim))
    return key
