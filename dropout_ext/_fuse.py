"""Modules of other libraries whose dropout runs fused with its neighbours, for `convert`.

A fused class overrides nothing but `forward`, and forward does at each place what the original does
unless what a fused call would pass over is plain.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module
from torch.nn.parameter import Buffer, Parameter

from . import _C, _rewrite, fused, modules
from ._keys import ModuleMixin

_PLAIN_TENSORS = (Tensor, Parameter, Buffer)
_KERNELS = ("cpu", "cuda") if _C.build_info()["cuda"] else ("cpu",)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# As they were at the import: what is put in their place later is called.
_DROPOUT = F.dropout
_GELU = F.gelu
_ACTIVATIONS = ((F.gelu, "gelu"), (F.relu, "relu"), (F.silu, "silu"))
# What modules call.
_CALL = nn.Module.__call__
_FUNCTIONS: dict[type, tuple[str, Any]] = {
    nn.LayerNorm: ("layer_norm", F.layer_norm),
    nn.GELU: ("gelu", F.gelu),
    nn.ReLU: ("relu", F.relu),
    nn.SiLU: ("silu", F.silu),
}
_FORWARDS: dict[type, Any] = {
    kind: kind.forward
    for kind in (nn.LayerNorm, nn.GELU, nn.ReLU, nn.SiLU, modules.Dropout, modules.DropPath)
}


class Functional(NamedTuple):
    """A call of F.dropout in a forward."""

    function: Callable[..., Tensor]
    p: float
    training: bool

    def __call__(self, input: Tensor) -> Tensor:
        return self.function(input, p=self.p, training=self.training)


def _why_called(module: Any, *kinds: type) -> str | None:
    """Why a module must be called rather than passed over, None where it need not be."""
    if type(module) not in kinds:
        return f"is of {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if type(module) in _FORWARDS and type(module).forward is not _FORWARDS[type(module)]:
        return "is of a class with another forward"
    if type(module).__call__ is not _CALL:
        return "is of a class that is called otherwise"
    if type(module) in _FUNCTIONS:
        name, function = _FUNCTIONS[type(module)]
        if getattr(F, name) is not function:
            return f"calls another F.{name}"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    return None


def _passes_over(module: Any, *kinds: type) -> bool:
    return _why_called(module, *kinds) is None


def _why_drop_called(drop: Any) -> str | None:
    """The same of what drops."""
    if type(drop) is Functional:
        return None if drop.function is _DROPOUT else "is another function"
    if isinstance(drop, modules.DropPath):
        if not drop._is_scaled_rows():
            return "does not drop samples and scale the others"
        return _why_called(drop, type(drop)._itself)
    return _why_called(drop, modules.Dropout) or ("is in place" if drop.inplace else None)


def _fuses(drop: Any, *tensors: Tensor | None) -> bool:
    return (
        _why_drop_called(drop) is None
        and drop.training
        and (drop.drop_prob if isinstance(drop, modules.DropPath) else drop.p) > 0
        and not (
            _nn_module._global_forward_hooks
            or _nn_module._global_forward_pre_hooks
            or _nn_module._global_backward_hooks
            or _nn_module._global_backward_pre_hooks
        )
        and _one_type(*tensors)
    )


def _is_plain(tensor: Any) -> bool:
    kind = type(tensor)
    return kind in _PLAIN_TENSORS and tensor.layout is torch.strided and not tensor.is_nested


def _one_type(first: Any, *others: Tensor | None) -> bool:
    """Whether they are plain tensors of one dtype on one device that has kernels for them."""
    if not _is_plain(first) or not first.is_floating_point():
        return False
    device = first.device
    if device.type not in _KERNELS or torch.is_autocast_enabled(device.type):
        return False
    return all(
        t is None or (_is_plain(t) and t.dtype == first.dtype and t.device == device)
        for t in others
    )


def _source(drop: Any, input: Tensor) -> dict[str, Any]:
    if type(drop) is Functional:
        return {"p": drop.p}
    source: dict[str, Any] = {"key": drop._key(None), "generator": drop.generator}
    if isinstance(drop, modules.DropPath):
        return source | {"p": drop.drop_prob, "broadcast_dims": range(1, input.dim())}
    return source | {"p": drop.p, "broadcast_dims": drop.broadcast_dims}


# What the forward methods of _rewrite.py call.


def adds(drop: Any, input: Tensor, residual: Tensor) -> bool:
    """Where both lie alike in memory, so does the sum, whichever comes first in it."""
    return (
        residual is not None
        and _fuses(drop, input, residual)
        and input.shape == residual.shape
        and (_contiguous(input, residual) or input.stride() == residual.stride())
    )


def _contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def add(drop: Any, input: Tensor, residual: Tensor) -> Tensor:
    return fused.dropout_add(input, residual, **_source(drop, input))


def norms(norm: Any, drop: Any, input: Tensor, residual: Tensor) -> bool:
    return (
        residual is not None
        and _passes_over(norm, nn.LayerNorm)
        and _fuses(drop, input, residual, norm.weight, norm.bias)
        and input.shape == residual.shape
        and input.shape[input.dim() - len(norm.normalized_shape) :] == norm.normalized_shape
    )


def norms_sum(norm: Any, drop: Any, input: Tensor, residual: Tensor) -> bool:
    """Of a sum that is used further, which is contiguous."""
    return norms(norm, drop, input, residual) and _contiguous(input, residual)


def add_norm(norm: Any, drop: Any, input: Tensor, residual: Tensor) -> Tensor:
    out: Tensor = fused.dropout_add_layer_norm(
        input, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps,
        **_source(drop, input),
    )  # fmt: skip
    return out


def add_then_norm(norm: Any, drop: Any, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm, and the sum that it is of."""
    out: tuple[Tensor, Tensor] = fused.dropout_add_layer_norm(
        input, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, return_sum=True,
        **_source(drop, input),
    )  # fmt: skip
    return out


def activate(activation: Any, input: Tensor, drop: Any) -> Tensor:
    name = _activation(activation)
    if name is None or not _fuses(drop, input):
        out: Tensor = drop(activation(input))
        return out
    return fused.activation_dropout(input, name[0], approximate=name[1], **_source(drop, input))


def _activation(activation: Any) -> tuple[str, str] | None:
    """Name and approximation, None where it has to be called."""
    if not isinstance(activation, nn.Module):
        for function, name in _ACTIVATIONS:
            if activation is function:
                return name, "none"
        return None
    if not _passes_over(activation, type(activation)):
        return None
    kind = type(activation)
    if type(activation) is nn.GELU:
        return "gelu", activation.approximate
    if kind in (nn.ReLU, nn.SiLU) and not activation.inplace:
        return "relu" if kind is nn.ReLU else "silu", "none"
    # What it calls is an attribute of the instance.
    if (kind.__module__, kind.__name__) == ("transformers.activations", "GELUActivation"):
        return ("gelu", "none") if activation.act is _GELU else None
    return None


class _Fused(ModuleMixin):
    """A class whose forward is fused. `convert` makes it of the original, `revert` that of it. Its
    names are long, since an instance's own submodules come after them.
    """

    _dropout_ext_original: Any  # a class of modules
    _dropout_ext_places: tuple[_rewrite.Place, ...]


def _as_original(module: nn.Module, input: Tensor, methods: tuple[str, ...]) -> bool:
    """Whether not to pass over methods that it has by itself."""
    return type(input) not in _PLAIN_TENSORS or any(name in module.__dict__ for name in methods)


def why_unfused(module: nn.Module) -> str:
    """What keeps a place of a fused module from being fused, for a summary."""
    for place in cast(Any, type(module))._dropout_ext_places:
        for name, why in _reasons(module, place):
            if why is not None:
                return f"partly as it was: its {name} {why}"
    return ""


def _reasons(module: nn.Module, place: _rewrite.Place) -> Iterator[tuple[str, str | None]]:
    """(name, why it is called) of all that a fused call would pass over."""
    if place.drop is not None:
        drop = getattr(module, place.drop, None)
        if isinstance(drop, nn.Identity):  # nothing drops, nothing is to be fused
            return
        yield place.drop, _why_drop_called(drop)
    if place.norm is not None:
        yield place.norm, _why_called(getattr(module, place.norm, None), nn.LayerNorm)
    if place.activation is not None:
        activation = getattr(module, place.activation, None)
        if _activation(activation) is None:
            kind = type(activation)
            why = _why_called(activation, kind) if isinstance(activation, nn.Module) else None
            yield place.activation, why or f"is of {kind.__name__}"


def _fusible(module: nn.Module, places: tuple[_rewrite.Place, ...]) -> bool:
    """Whether anything in it can be fused."""
    for place in places:
        reasons = dict(_reasons(module, place))
        if place.drop in reasons or place.drop is None:
            unfused = [name for name, why in reasons.items() if why is not None]
            # A sum is fused without its norm.
            if not set(unfused) - {place.norm}:
                return True
    return False


class TransformerEncoderLayer(_Fused, nn.TransformerEncoderLayer):
    _dropout_ext_original = nn.TransformerEncoderLayer
    _dropout_ext_places = (
        _rewrite.Place("dropout", activation="activation"),
        _rewrite.Place("dropout1", "norm1"),
        _rewrite.Place("dropout2", "norm2"),
    )

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if isinstance(src, torch.fx.Proxy) and src.tracer.module_stack:
            return _leaf(src, src_mask, src_key_padding_mask, is_causal)
        if not self.training or _as_original(self, src, ("_sa_block", "_ff_block")):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        src_key_padding_mask = F._canonical_mask(
            mask=src_key_padding_mask,
            mask_name="src_key_padding_mask",
            other_type=F._none_or_dtype(src_mask),
            other_name="src_mask",
            target_type=src.dtype,
        )
        src_mask = F._canonical_mask(
            mask=src_mask,
            mask_name="src_mask",
            other_type=None,
            other_name="",
            target_type=src.dtype,
            check_other=False,
        )

        def attend(x: Tensor) -> Any:
            return self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask,
                need_weights=False, is_causal=is_causal,
            )[0]  # fmt: skip

        if self.norm_first:
            x, total = _add_then_norm(self.dropout1, self.norm2, attend(self.norm1(src)), src)
            return _add(self.dropout2, _feed_forward(self, x), total)
        x = _add_norm(self.dropout1, self.norm1, attend(src), src)
        return _add_norm(self.dropout2, self.norm2, _feed_forward(self, x), x)


class TransformerDecoderLayer(_Fused, nn.TransformerDecoderLayer):
    _dropout_ext_original = nn.TransformerDecoderLayer
    _dropout_ext_places = (
        _rewrite.Place("dropout", activation="activation"),
        _rewrite.Place("dropout1", "norm1"),
        _rewrite.Place("dropout2", "norm2"),
        _rewrite.Place("dropout3", "norm3"),
    )

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        given = (
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
            tgt_is_causal, memory_is_causal,
        )  # fmt: skip
        if isinstance(tgt, torch.fx.Proxy) and tgt.tracer.module_stack:
            return _leaf(*given)
        if _as_original(self, tgt, ("_sa_block", "_mha_block", "_ff_block")):
            return super().forward(*given)

        def attend(x: Tensor) -> Any:
            return self.self_attn(
                x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask,
                is_causal=tgt_is_causal, need_weights=False,
            )[0]  # fmt: skip

        def attend_memory(x: Tensor) -> Any:
            return self.multihead_attn(
                x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
                is_causal=memory_is_causal, need_weights=False,
            )[0]  # fmt: skip

        if self.norm_first:
            x, total = _add_then_norm(self.dropout1, self.norm2, attend(self.norm1(tgt)), tgt)
            x, total = _add_then_norm(self.dropout2, self.norm3, attend_memory(x), total)
            return _add(self.dropout3, _feed_forward(self, x), total)
        x = _add_norm(self.dropout1, self.norm1, attend(tgt), tgt)
        x = _add_norm(self.dropout2, self.norm2, attend_memory(x), x)
        return _add_norm(self.dropout3, self.norm3, _feed_forward(self, x), x)


def _add(drop: Any, input: Tensor, residual: Tensor) -> Tensor:
    if adds(drop, input, residual):
        return add(drop, input, residual)
    total: Tensor = residual + drop(input)
    return total


def _add_norm(drop: Any, norm: Any, input: Tensor, residual: Tensor) -> Tensor:
    if norms(norm, drop, input, residual):
        return add_norm(norm, drop, input, residual)
    out: Tensor = norm(_add(drop, input, residual))
    return out


def _add_then_norm(drop: Any, norm: Any, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    if norms(norm, drop, input, residual):
        return add_then_norm(norm, drop, input, residual)
    total = _add(drop, input, residual)
    return norm(total), total


def _leaf(*args: Any) -> Any:
    """A call that torch.fx.symbolic_trace does not look into, as it does not into the original."""
    tracer = args[0].tracer
    path, _ = next(reversed(tracer.module_stack.values()))
    return tracer.create_proxy("call_module", path, args, {})


def _feed_forward(layer: Any, x: Tensor) -> Any:
    return layer.linear2(activate(layer.activation, layer.linear1(x), layer.dropout))


class _Rewritten(_Fused):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not what the original does with its subclasses: this one is no other class to anybody."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(2)
        if "_dropout_ext_original" not in vars(type(self)):  # a subclass that somebody made
            return cast(tuple[Any, ...], reduced)
        make, arguments, *state = reduced
        # Any other is the original's own.
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return make, arguments, *state
        return _rebuild, (type(self)._dropout_ext_original,), *state


_BY_CLASS = {
    kind._dropout_ext_original: kind for kind in (TransformerEncoderLayer, TransformerDecoderLayer)
}


def _fused_class(original: Any) -> Any:
    if original in _BY_CLASS:
        return _BY_CLASS[original]
    if issubclass(original, _Fused) or type(original) is not type:
        return None
    if not isinstance(inspect.getattr_static(original, "forward"), FunctionType):
        return None
    return _with_forward(original, cast(Any, original).forward)


@functools.cache
def _with_forward(original: Any, forward: Any) -> Any:
    new = _rewrite.rewritten(original, forward)
    if new is None:
        return None
    namespace = {
        "__doc__": original.__doc__,
        "__module__": __name__,
        "_dropout_ext_original": original,
        "_dropout_ext_places": new.places,
        _rewrite.FUSION: sys.modules[__name__],
        "forward": new.function,
    }
    return type(original.__name__, (_Rewritten, original), namespace)


def fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that does the same with fused dropout, None where there is none for this module."""
    kind = _fused_class(type(module))
    return kind if kind is not None and _fusible(module, kind._dropout_ext_places) else None


def _rebuild(original: Any) -> Any:
    """A module of the fused class, or of the original where that is another one by now."""
    kind = _fused_class(original) or original
    return kind.__new__(kind)


def is_fused(module: nn.Module) -> TypeGuard[_Fused]:
    # A class that fully_shard has made of a fused one is another.
    return isinstance(module, _Fused) and "_dropout_ext_original" in vars(type(module))
