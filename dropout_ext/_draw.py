"""Where calls that are not plain eager ones get their keys: draws that a compiler or a transform
can see.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.fx.traceback
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils.checkpoint import CheckpointPolicy

from . import _C, _keys
from ._ops import InDims, ops

if TYPE_CHECKING:
    from torch._functorch.autograd_function import VmapInfo

_library = torch.library.Library("dropout_ext", "FRAGMENT")


def _seal_key(words: Tensor) -> Tensor:
    """The complement of drawn words, marked so that the backward of a compiled function reads the
    key that its forward drew: under an activation memory budget the partitioner would draw again.
    """
    meta = torch.fx.traceback.current_meta
    # Not torch.compiler.is_compiling(), which is False inside of AOTAutograd before torch 2.13.
    if not torch.fx.traceback.has_preserved_node_meta() or "recompute" in meta:
        return words.bitwise_not()
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        return words.bitwise_not()
    finally:
        del meta["recompute"]


_library.define("seal_key(Tensor words) -> Tensor", tags=[torch.Tag.pt2_compliant_tag])
_library.impl("seal_key", _seal_key, "CompositeImplicitAutograd")


def _seal_key_batched(info: VmapInfo, in_dims: InDims, words: Tensor) -> tuple[Tensor, int | None]:
    return ops.seal_key(words), in_dims[0]


torch.library.register_vmap("dropout_ext::seal_key", _seal_key_batched)


def is_traced(input: Tensor) -> bool:
    """Whether a key must come from operators that a compiler or a transform can see.

    Anything else, any dispatch mode and any subclass, draws as plain eager does, so that a
    recomputation outside the mode agrees with its forward.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    mode = torch._C._TorchDispatchModeKey
    return (
        peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(
            torch._C._get_dispatch_mode(key) is not None
            for key in (mode.FAKE, mode.PROXY, mode.FUNCTIONAL)
        )
        or hasattr(input, "fake_mode")
    )


def draw_key(input: Tensor, generator: torch.Generator | None) -> Tensor:
    """A fresh key for `input`, on its device or on the CPU: that of a `keys` context, or drawn."""
    if generator is None:
        key = _keys.next_key()
        if key is not None:
            return key
    if input.device.type == "meta":
        return torch.empty(2, dtype=torch.int64, device="meta")
    if not is_traced(input):
        return _C.draw_key(generator, input.device)
    if generator is not None and torch.compiler.is_dynamo_compiling():
        raise RuntimeError(
            "dropout(): argument 'generator' cannot be compiled: draw a key outside of the "
            "compiled function and pass it as 'key'"
        )
    if generator is not None:
        _C.check_generator(generator, input.device)
    device = input.device if generator is None else generator.device
    mode: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not torch.compiler.is_dynamo_compiling():
        mode = getattr(input, "fake_mode", mode)
    with mode:
        # One draw per word: inductor's CPU code keeps 32 bits of seed per call. int64, because
        # randint has no uint64.
        words = [
            torch.randint(0, 2**63 - 1, (1,), device=device, generator=generator) for _ in range(2)
        ]
        sealed: Tensor = ops.seal_key(torch.cat(words))
        return sealed
