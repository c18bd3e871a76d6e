"""Jagged tensors: the mask runs over the values, (sum of lengths, ...)."""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from . import _C, _call


def run(input: Tensor, call: _call.Call) -> Tensor:
    if input.layout != torch.jagged:
        raise TypeError(
            f"dropout(): argument 'input' is a nested tensor of layout {input.layout}, but "
            "accepted are those of layout torch.jagged"
        )
    if call.mask_strides is not None:
        raise ValueError(
            "dropout(): argument 'input' is a nested tensor: no dimension can share decisions and "
            "no mask_strides apply; apply the function to input.values(), or to "
            "input.to_padded_tensor(0)"
        )
    if call.inplace and input.requires_grad and torch.is_grad_enabled():
        if not is_dynamo_compiling():
            _C.check_writable(input.values())
        # Of a clone, since PyTorch has no gradient for values() of what is then overwritten.
        return input.copy_(run(input.clone(), call._replace(inplace=False)))
    values = _call.run(input.values(), call)
    if call.inplace:
        return input
    jagged: Any = input  # of a class that no public name stands for
    return torch.nested.nested_tensor_from_jagged(
        values,
        jagged.offsets(),
        jagged.lengths(),
        jagged._ragged_idx,
        jagged._maybe_min_seqlen,
        jagged._maybe_max_seqlen,
    )
