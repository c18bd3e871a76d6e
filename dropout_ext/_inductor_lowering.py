"""Inductor's lowering of dropout's operator.

Opaque, dropout keeps its neighbours apart and passes over memory once more. Here the mask becomes a
tensor of its own, of bytes or of bits, and the rest, keep ? input * scale : dropped, a part of
whatever loop comes before or after; on the CPU, where none comes after, the operator runs in place.
Graphs have the operator until then, so that what they save for the backward pass is the key.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._inductor import cpu_vec_isa, ir, lowering
from torch._inductor.utils import is_view
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ._inductor import switch, warn

APPLY = torch.ops.dropout_ext.apply.default
APPLY_ = torch.ops.dropout_ext.apply_.default
KEEP_BITS = torch.ops.dropout_ext.keep_bits.default
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# On the CPU the operator is as fast as memory, and the price of a fused loop is the pass that
# writes its mask. Where the operator's own passes go to memory, that is less; for tensors that stay
# in the cache, and for 16-bit types, it is not.
CPU_BYTES = 8 << 20


def register() -> None:
    # What an opaque compilation, before this one, has noted of the operator.
    lowering.fallbacks.discard(APPLY)
    lowering.needs_realized_inputs.discard(APPLY)
    lowering._maybe_layout_constraints.pop(APPLY, None)
    lowering.register_lowering(APPLY, type_promotion_kind=None)(lower)


def lower(
    input: Any, key: Any, p: Any, scale: Any, mask_strides: Sequence[Any], mask_offset: Any,
    bias: Any = None, dropped: Any = 0.0,
) -> Any:  # fmt: skip
    arguments = (input, key, p, scale, mask_strides, mask_offset, bias, dropped)
    mode = switch()
    try:
        node = V.graph.current_node
        if mode != "never" and input.get_dtype() in DTYPES:
            if fits(*arguments) and (mode == "always" or pays(node)):
                return fused(node, *arguments)
            if mode == "auto" and is_last(node):
                return in_place(*arguments)
    except Exception as error:
        warn(error)
    return opaque(APPLY, *arguments)


def opaque(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    return lowering.fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def fits(
    input: Any, key: Any, p: Any, scale: Any, mask_strides: Sequence[Any], mask_offset: Any,
    bias: Any, dropped: Any,
) -> bool:  # fmt: skip
    return (
        input.get_device().type in ("cpu", "cuda")
        and len(input.get_size()) > 0
        and all(isinstance(number, (int, float)) for number in (p, scale, dropped))
        and bias is None  # else one fused multiply-add, which Inductor's C++ does not have
    )


def pays(node: Any) -> bool:
    """Whether the operator would stand between loops, or keep one from memory."""
    output = node.meta["val"]
    if output.device.type != "cpu":
        return _follows_loop(node) or _precedes_loop(node)
    bytes = _hint(output.numel()) * output.dtype.itemsize
    large = output.dtype.itemsize >= 4 and bytes >= CPU_BYTES
    return large and loads_bytes() and _precedes_loop(node)


def loads_bytes() -> bool:
    """Whether a vector of bytes that is not full, of 16 numbers say, is one masked load. With AVX2
    it goes through memory: a fused loop took twice the time of the operator."""
    return cpu_vec_isa.pick_vec_isa().bit_width() >= 512


def is_last(node: Any) -> bool:
    """Whether it comes after a loop and before none: then, on the CPU, it is fastest in place."""
    on_cpu = node.meta["val"].device.type == "cpu"
    return on_cpu and _follows_loop(node) and not _precedes_loop(node)


def _follows_loop(node: Any) -> bool:
    return any(map(_is_loop, _through_views(node.args[0], before=True)))


def _precedes_loop(node: Any) -> bool:
    return any(map(_is_loop, _through_views(node, before=False)))


def _through_views(node: Any, before: bool) -> Iterator[Any]:
    if not before:
        for user in node.users:
            yield from _through_views(user, before) if _is_view(user) else (user,)
    elif _is_view(node):
        yield from _through_views(node.args[0], before)
    else:
        yield node


def _is_view(node: Any) -> bool:
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and is_view(node.target)
    )


def _is_loop(node: Any) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return _is_loop(node.args[0])
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in lowering.fallbacks:
        return False
    return (
        torch.Tag.pointwise in target.tags
        or torch.Tag.reduction in target.tags
        or target.namespace == "prims"
    )


def in_place(input: Any, *arguments: Any) -> Any:
    """On what the loop before it wrote: nothing new is allocated, whose pages would come first."""
    written = lowering.clone(input)  # of a loop: that loop, with a buffer that nobody else knows
    written.realize()
    opaque(APPLY_, written, *arguments)
    return written


def fused(
    node: Any, input: Any, key: Any, p: Any, scale: Any, mask_strides: Sequence[Any],
    mask_offset: Any, bias: Any, dropped: Any,
) -> Any:  # fmt: skip
    keep = keep_mask(node, input, key, p, mask_strides, mask_offset)
    dtype = torch.float64 if input.get_dtype() == torch.float64 else torch.float32

    def select(x: Any, keep: Any) -> Any:
        kept = ops.mul(x, ops.constant(scale, dtype))
        return ops.where(keep, kept, ops.constant(dropped, dtype))

    return lowering.make_pointwise(select)(input, keep)


def keep_mask(
    node: Any, input: Any, key: Any, p: Any, mask_strides: Sequence[Any], mask_offset: Any
) -> Any:
    """A bool tensor that is never stored: a loop over it reads the stored bytes or bits."""
    device, size = input.get_device(), list(input.get_size())
    batched = len(key.get_size()) == 2
    # Stored is one decision of each, in the order of the input's memory; the slices of a batched
    # key come first.
    shared = [stride == 0 and not (batched and d == 0) for d, stride in enumerate(mask_strides)]
    order = _memory_order(node.meta["val"], first=1 if batched else 0)
    stored = [sympy.S.One if shared[d] else size[d] for d in order]
    arguments = (p, stored, [mask_strides[d] for d in order], mask_offset)
    # One for all calls with this key: a node of the graph, as views of one buffer share its name.
    masks = V.graph.__dict__.setdefault("_dropout_ext_masks", {})
    name = (node.args[1], str(device), str(arguments))
    if name not in masks:
        key.realize()
        masks[name] = opaque(KEEP_BITS, key, *arguments, device=device)
    load = masks[name].make_loader()

    def kept(index: Sequence[Any]) -> Any:
        position = [sympy.S.Zero if shared[d] else index[d] for d in order]
        return of_byte(load, position) if in_bytes(device) else of_bits(load, position, stored)

    return ir.Pointwise.create(device=device, dtype=torch.bool, inner_fn=kept, ranges=size)


def in_bytes(device: torch.device) -> bool:
    """Whether keep_bits makes bytes there."""
    return device.type == "cpu"


def of_byte(load: Any, position: Sequence[Any]) -> Any:
    # By way of a number: so Inductor's C++ is vectorised, as it is not for bool.
    byte = ops.to_dtype(load(position), torch.float32, src_dtype=torch.uint8)
    return ops.gt(byte, ops.constant(0.5, torch.float32))


def of_bits(load: Any, position: Sequence[Any], size: Sequence[Any]) -> Any:
    i = sympy.S.Zero
    for at, n in zip(position, size, strict=True):
        i = i * n + at
    byte = ops.to_dtype(load([FloorDiv(i, 8)]), torch.int32, src_dtype=torch.uint8)
    number: Any = ModularIndexing(i, 1, 8)
    bit = ops.bitwise_right_shift(byte, ops.index_expr(number, torch.int32))
    one, zero = (ops.constant(value, torch.int32) for value in (1, 0))
    return ops.ne(ops.bitwise_and(bit, one), zero)


def _memory_order(tensor: Tensor, first: int) -> list[int]:
    """Dimensions from the outermost in memory to the innermost, but for the first of them."""
    inner = range(first, tensor.dim())
    return [*range(first), *sorted(inner, key=lambda d: -_hint(tensor.stride(d)))]


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    # Sizes that depend on data have none: large ones.
    hint = getattr(size.node, "hint", None)
    return 1 << 20 if hint is None else int(hint)
