"""Modules of other libraries whose dropout runs fused with its neighbours, for `convert`.

A fused class overrides nothing but `forward`, and forward does at each place what the original does
unless the modules that a fused call would pass over are plain ones.
"""

from __future__ import annotations
import __future__

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _nn_module
from torch.nn.parameter import Buffer, Parameter

from . import _C, fused, modules

_PLAIN_TENSORS = (Tensor, Parameter, Buffer)
_KERNELS = ("cpu", "cuda") if _C.build_info()["cuda"] else ("cpu",)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _why_called(module: nn.Module, *kinds: type) -> str | None:
    """Why a module must be called rather than passed over, None where it need not be."""
    if type(module) not in kinds:
        return f"is of {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return "has hooks"
    if module._compiled_call_impl is not None:
        return "is compiled by itself"
    return None


def _passes_over(module: nn.Module, *kinds: type) -> bool:
    return _why_called(module, *kinds) is None


def _fuses(drop: nn.Module, *tensors: Tensor | None) -> bool:
    return (
        _passes_over(drop, modules.Dropout)
        and drop.training
        and drop.p > 0
        and not (
            _nn_module._global_forward_hooks
            or _nn_module._global_forward_pre_hooks
            or _nn_module._global_backward_hooks
            or _nn_module._global_backward_pre_hooks
        )
        and _one_type(*tensors)
    )


def _one_type(first: Tensor, *others: Tensor | None) -> bool:
    """Whether they are plain tensors of one dtype on one device that has kernels for them."""
    if type(first) not in _PLAIN_TENSORS or not first.is_floating_point() or first.is_nested:
        return False
    device = first.device
    if device.type not in _KERNELS or torch.is_autocast_enabled(device.type):
        return False
    return all(
        t is None or (type(t) in _PLAIN_TENSORS and t.dtype == first.dtype and t.device == device)
        for t in others
    )


def _source(drop: modules.Dropout) -> dict[str, object]:
    return {
        "p": drop.p,
        "key": drop._key(None),
        "generator": drop.generator,
        "broadcast_dims": drop.broadcast_dims,
    }


def _add(drop: nn.Module, input: Tensor, residual: Tensor) -> Tensor:
    if _fuses(drop, input, residual) and input.shape == residual.shape:
        return fused.dropout_add(input, residual, **_source(drop))
    return residual + drop(input)


def _norm_fuses(drop: nn.Module, norm: nn.Module, input: Tensor, residual: Tensor) -> bool:
    return (
        _passes_over(norm, nn.LayerNorm)
        and _fuses(drop, input, residual, norm.weight, norm.bias)
        and input.shape == residual.shape
    )


def _add_norm(drop: nn.Module, norm: nn.Module, input: Tensor, residual: Tensor) -> Tensor:
    if not _norm_fuses(drop, norm, input, residual):
        return norm(residual + drop(input))
    return fused.dropout_add_layer_norm(
        input, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, **_source(drop)
    )


def _add_then_norm(drop, norm, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The norm, and the sum that it is of."""
    if not _norm_fuses(drop, norm, input, residual):
        total = residual + drop(input)
        return norm(total), total
    return fused.dropout_add_layer_norm(
        input, residual, norm.normalized_shape, norm.weight, norm.bias, norm.eps, return_sum=True,
        **_source(drop),
    )  # fmt: skip


def _activate(drop: nn.Module, activation, input: Tensor) -> Tensor:
    name = {F.relu: "relu", F.gelu: "gelu"}.get(activation) if callable(activation) else None
    if name is None or not _fuses(drop, input):
        return drop(activation(input))
    return fused.activation_dropout(input, name, **_source(drop))


class _Fused:
    """A class whose forward is fused. `convert` makes it of `_original`, `revert` that of it."""

    _original: type[nn.Module]
    _passed_over: tuple[str, ...]  # children that a fused call does not call
    _methods: tuple[str, ...] = ()  # of the original, which it does not call either

    def _as_original(self, input: Tensor) -> bool:
        return type(input) not in _PLAIN_TENSORS or any(
            name in self.__dict__ for name in self._methods
        )

    def why_unfused(self) -> str:
        """What keeps a place from being fused, for a summary."""
        for name in self._passed_over:
            kind = modules.Dropout if "dropout" in name else nn.LayerNorm
            why = _why_called(getattr(self, name), kind)
            if why is not None:
                return f"partly as it was: its {name} {why}"
        return ""


class TransformerEncoderLayer(_Fused, nn.TransformerEncoderLayer):
    _original = nn.TransformerEncoderLayer
    _passed_over = ("dropout", "dropout1", "dropout2", "norm1", "norm2")
    _methods = ("_sa_block", "_ff_block")

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if isinstance(src, torch.fx.Proxy) and src.tracer.module_stack:
            return _leaf(src, src_mask, src_key_padding_mask, is_causal)
        if not self.training or self._as_original(src):
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

        def attend(x):
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
    _original = nn.TransformerDecoderLayer
    _passed_over = ("dropout", "dropout1", "dropout2", "dropout3", "norm1", "norm2", "norm3")
    _methods = ("_sa_block", "_mha_block", "_ff_block")

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
        if self._as_original(tgt):
            return super().forward(*given)

        def attend(x):
            return self.self_attn(
                x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask,
                is_causal=tgt_is_causal, need_weights=False,
            )[0]  # fmt: skip

        def attend_memory(x):
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


def _leaf(*args):
    """A call that torch.fx.symbolic_trace does not look into, as it does not into the original."""
    tracer = args[0].tracer
    path, _ = next(reversed(tracer.module_stack.values()))
    return tracer.create_proxy("call_module", path, args, {})


def _feed_forward(layer, x: Tensor) -> Tensor:
    return layer.linear2(_activate(layer.dropout, layer.activation, layer.linear1(x)))


# The forward methods that are known by their code, as it stands in many modules of transformers.


def _dense_drop_norm_add(self, hidden_states, input_tensor):
    hidden_states = self.dense(hidden_states)
    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)
    return hidden_states


class _DenseDropNormAdd(_Fused):
    """Output and SelfOutput of the BERT family."""

    _passed_over = ("dropout", "LayerNorm")

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states = self.dense(hidden_states)
        return _add_norm(self.dropout, self.LayerNorm, hidden_states, input_tensor)

    def __reduce_ex__(self, protocol):
        return _rebuild, (self._original,), self.__getstate__()


def _code(function):
    """What a function does, whatever its local names and its documentation."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    consts = tuple(c for c in code.co_consts if c is not None and c != function.__doc__)
    flags = code.co_flags & ~__future__.annotations.compiler_flag
    return code.co_code, code.co_names, consts, code.co_argcount, flags


_BY_CODE = {_code(_dense_drop_norm_add): _DenseDropNormAdd}
_BY_CLASS = {kind._original: kind for kind in (TransformerEncoderLayer, TransformerDecoderLayer)}


@functools.cache
def fused_class(original: type[nn.Module]) -> type[nn.Module] | None:
    """The class that does the same with fused dropout, None where there is none."""
    if original in _BY_CLASS:
        return _BY_CLASS[original]
    if issubclass(original, _Fused) or original.__call__ is not nn.Module.__call__:
        return None
    known = _BY_CODE.get(_code(original.forward))
    if known is None:
        return None
    namespace = {"_original": original, "__module__": __name__, "__doc__": original.__doc__}
    return type(original.__name__, (known, original), namespace)


def _rebuild(original: type[nn.Module]) -> nn.Module:
    """A module of the fused class, or of the original where that is another one by now."""
    kind = fused_class(original) or original
    return kind.__new__(kind)


def is_fused(module: nn.Module) -> bool:
    return type(module) in _BY_CLASS.values() or (
        isinstance(module, _Fused) and type(module) is fused_class(module._original)
    )
