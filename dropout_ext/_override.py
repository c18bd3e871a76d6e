"""Functional dropout calls of PyTorch routed to ours, without a change to the model."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from torch import Tensor, overrides
from torch._C._dynamo import eval_frame
from torch._ops import HigherOrderOperator
from torch.compiler import is_dynamo_compiling
from torch.nn.parameter import Buffer, Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._contextlib import _NoParamDecoratorContextManager

from . import _attention as _sdpa
from . import _keys, functional
from ._call import Call

__all__ = ["override"]

Function = TypeVar("Function", bound=Callable[..., Any])


def _no_frame(function: Function) -> Function:
    """Keeps Dynamo from compiling `function` by itself, as it may where it runs the caller in eager
    mode. It still inlines it, and compiles what it calls.

    The `__torch_function__` of a mode must not be compiled alone: Dynamo takes one Tensor method
    that comes as its `func` for another (torch 2.11 to 2.14). `torch.compiler.disable` would
    break the graph where it is inlined; importing `torch._dynamo` for its `skip_code`, which is
    this, would take a second.
    """
    skip = eval_frame._FrameExecStrategy(
        eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT
    )
    eval_frame.set_code_exec_strategy(function.__code__, skip)
    return function


class override(TorchFunctionMode, _NoParamDecoratorContextManager):
    """`with override():` sends functional dropout to `dropout_ext.functional`, in the thread that
    entered it, in eager mode and under `torch.compile`, entered outside of the compiled function or
    inside of it. It nests.

    Routed: `dropout`, `dropout1d`, `dropout2d`, `dropout3d`, `alpha_dropout` and
    `feature_alpha_dropout` of `torch.nn.functional`; `dropout`, `feature_dropout`, `alpha_dropout`
    and `feature_alpha_dropout` of `torch`, with their in-place forms; the attention weights of
    `torch.nn.functional.multi_head_attention_forward`; and
    `torch.nn.functional.scaled_dot_product_attention` with `dropout_p` > 0 where PyTorch would take
    its math path, which materialises the attention matrix: on the CPU always, on CUDA where no
    fused kernel accepts the call. Compiled calls on CUDA and calls on other devices keep PyTorch's
    attention.

    Regions of `torch.utils.checkpoint` are run again by the same functions, wherever the backward
    pass runs. Those of other libraries need the backward pass inside of the context too.

    Not reached: `nn.LSTM`, `nn.GRU` and `nn.RNN` with `dropout` > 0, and fused attention kernels,
    which drop inside C++; calls of `torch.ops.aten`; calls in code that was traced, scripted or
    exported before; in compiled code, functions of `torch.compiler.allow_in_graph` and the
    functions that higher-order operators are given, other than checkpoint, `nested_compile_region`,
    `cond`, `while_loop`, `map` and `scan`. `convert` reaches modules in all of them.

    Inference with `nn.TransformerEncoder`, its layers or `nn.MultiheadAttention` is better left
    outside. They leave their fast path under any torch-function mode, as they do after
    `torch.backends.mha.set_fastpath_enabled(False)`: a nested tensor is an error, padded positions
    are not set to 0, and rows that are masked altogether have other values.

    Args:
        orig_func (callable, optional): what `@override` decorates, a function or a generator
            function, which then runs under it. `@override()` does the same. Default: None, for
            `with`

    Raises:
        TypeError: decorates a class, a module or an async function.

    Example:
        >>> x = torch.ones(1000)
        >>> with dropout_ext.override():
        ...     y = torch.nn.functional.dropout(x, 0.1)  # dropout_ext.dropout(x, 0.1)
        >>> @dropout_ext.override()
        ... def layer(x):
        ...     return torch.nn.functional.dropout(x, 0.1)
        >>> _ = torch.manual_seed(0)
        >>> y = layer(x)
        >>> _ = torch.manual_seed(0)
        >>> torch.equal(y, dropout_ext.dropout(x, 0.1))
        True
    """

    def __call__(self, orig_func: Function) -> Function:
        what: str | None = None
        given: Any = orig_func
        if inspect.isclass(given):
            what = f"the class {given.__name__}: decorate its methods"
        elif isinstance(given, torch.nn.Module):
            what = f"{type(given).__name__}: use `with override():`, or decorate its forward"
        elif inspect.iscoroutinefunction(given) or inspect.isasyncgenfunction(given):
            what = f"the async function {given.__name__}: use `with override():` inside of it"
        elif not callable(given):
            what = type(given).__name__
        if what is not None:
            raise TypeError(f"override(): argument 'orig_func' must be a function, not {what}")
        return super().__call__(orig_func)

    @_no_frame
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() and isinstance(func, HigherOrderOperator):
            return _region(func, args, kwargs)
        route = _ROUTES.get(func)
        if route is None or not all(t in _PLAIN_TYPES for t in types):
            return func(*args, **kwargs)
        if func not in _BACKWARDS:
            return route(*args, **kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        with self:
            return route(*args, **kwargs)


# Subclasses with a __torch_function__ of their own decide for themselves.
_PLAIN_TYPES = frozenset({Tensor, Parameter, Buffer})


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    return functional.dropout(input, p, train)


def _dropout_(input: Tensor, p: float, train: bool) -> Tensor:
    return functional.dropout(input, p, train, True)


def _alpha_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    return functional.alpha_dropout(input, p, train)


def _alpha_dropout_(input: Tensor, p: float, train: bool) -> Tensor:
    return functional.alpha_dropout(input, p, train, True)


def _feature_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    return functional._features(input, Call(p, train))


def _feature_dropout_(input: Tensor, p: float, train: bool) -> Tensor:
    return functional._features(input, Call(p, train, True))


def _feature_alpha_dropout(input: Tensor, p: float, train: bool) -> Tensor:
    return functional.feature_alpha_dropout(input, p, train)


def _feature_alpha_dropout_(input: Tensor, p: float, train: bool) -> Tensor:
    return functional.feature_alpha_dropout(input, p, train, True)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: who computes a call is decided here.

    Ours are calls that drop, that PyTorch would accept, and that it would compute by its math path.
    All others go to PyTorch, so that its own errors appear.
    """
    if _drops(dropout_p) and all(isinstance(t, Tensor) for t in (query, key, value)):
        tensors = _sdpa.cast(query.device.type, (query, key, value, attn_mask))
        if _sdpa.accepts(*tensors, is_causal, scale, enable_gqa) and _takes_math_path(
            *tensors, dropout_p, is_causal, scale, enable_gqa
        ):
            return _sdpa.attention(*tensors, dropout_p, is_causal, scale, enable_gqa, None, None)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _drops(dropout_p: float) -> bool:
    try:
        return bool(0 < dropout_p <= 1)
    except (TypeError, ValueError, RuntimeError):  # no number
        return False


def _takes_math_path(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool,
) -> bool:  # fmt: skip
    """Whether PyTorch would materialise the attention matrix and drop from it."""
    if query.device.type == "cpu":
        # With dropout, its only path there. Without it, by `sdpa_kernel`, the call is an error.
        return _sdpa.math_path_flags()[0]
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    # What the C++ function asks itself; nothing public tells.
    choice = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return choice == torch.nn.attention.SDPBackend.MATH.value


def _never(tensors: object) -> bool:
    return False


def _copy(function: Any, **replaced: Any) -> FunctionType:
    """`function` with other globals: it does not go to a mode again, and calls what is replaced."""
    # Dynamo finds the globals of a function by their __name__, and would find PyTorch's.
    names = {name: value for name, value in function.__globals__.items() if name != "__name__"}
    names |= {"has_torch_function": _never, "has_torch_function_unary": _never} | replaced
    copy = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# PyTorch switches a mode off while the mode handles a call, so that dropout inside of the call does
# not come to it. This is the only function of PyTorch that drops inside and is written in Python.
_multi_head_attention = _copy(
    F.multi_head_attention_forward,
    dropout=functional.dropout,
    scaled_dot_product_attention=_attention,
)


# Backward passes: what they run of Python, hooks and recomputations, is under the mode too.
_BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)


@_no_frame
def _inside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with override():
        return function(*args, **kwargs)


@_no_frame
def _outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    modes = overrides._get_current_function_mode_stack()
    if not any(isinstance(mode, override) for mode in modes):
        return function(*args, **kwargs)
    _replace_modes([mode for mode in modes if not isinstance(mode, override)])
    try:
        return function(*args, **kwargs)
    finally:
        _replace_modes(modes)


@_no_frame
def _replace_modes(modes: Iterable[TorchFunctionMode]) -> None:
    for _ in overrides._get_current_function_mode_stack():
        overrides._pop_mode()
    for mode in modes:
        overrides._push_mode(mode)


@_no_frame
def _as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, to be run again later with override on or off as it is now, and the same keys."""
    modes = overrides._get_current_function_mode_stack()
    on = any(isinstance(mode, override) for mode in modes)
    again = functools.partial(_resume, _keys.Resumed(), function)
    return functools.partial(_inside if on else _outside, again)


@_no_frame
def _resume(resumed: _keys.Resumed, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with resumed:
        return function(*args, **kwargs)


def _carry_into_checkpoints() -> None:
    """Has PyTorch's checkpoints keep override and keys as they keep autocast and the default
    device: what they run again in the backward pass drops as in the forward pass, wherever the
    backward pass runs. They offer no hook for it. Left alone, reentrant ones give wrong gradients,
    others raise.
    """
    kind: Any = checkpointing.CheckpointFunction
    frame: Any = checkpointing._CheckpointFrame
    forward = kind.forward
    initialise = frame.__init__

    @functools.wraps(forward)
    @_no_frame
    def carrying_forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        again = _as_now(run_function)
        outputs = forward(ctx, run_function, *args)
        ctx.run_function = again
        return outputs

    @functools.wraps(initialise)
    @_no_frame
    def carrying_initialise(
        self: Any, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> None:
        initialise(self, _as_now(recompute_fn), *args, **kwargs)

    kind.forward = staticmethod(carrying_forward)
    frame.__init__ = carrying_initialise


_carry_into_checkpoints()


def _region(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call of a higher-order operator while it is traced. The functions that it is given are
    traced while the mode handles the call, and is switched off. So each of them enters it again.
    """
    places: tuple[int, ...] = ()
    for kind, where in _REGIONS.items():
        # Of these operators Dynamo knows the class alone in every version.
        if isinstance(operator, kind):
            places = where
    if not is_dynamo_compiling() and isinstance(operator, (_CHECKPOINT, _NESTED_COMPILE_REGION)):
        places = ()  # outside of Dynamo their functions are graphs, which they look into
    if not places:
        return operator(*args, **kwargs)
    with override():
        pass  # for Dynamo, a region may not be the first to touch the stack of modes
    if isinstance(operator, _NESTED_COMPILE_REGION):  # takes no partial
        return operator(_inside, *args, **kwargs)
    args = list(args)
    for n in places:
        function = args[n]
        # scan looks for its function among the keywords of the one that it is given
        keywords = function.keywords if isinstance(function, functools.partial) else {}
        args[n] = functools.partial(_inside, function, **keywords)
    return operator(*args, **kwargs)


_CHECKPOINT = type(torch.ops.higher_order.tag_activation_checkpoint)
_NESTED_COMPILE_REGION = type(torch.ops.higher_order.invoke_subgraph)

# Where the functions are that a higher-order operator calls.
_REGIONS = {
    _CHECKPOINT: (0,),
    _NESTED_COMPILE_REGION: (0,),
    type(torch.ops.higher_order.cond): (1, 2),
    type(torch.ops.higher_order.while_loop): (0, 1),
    type(torch.ops.higher_order.map_impl): (0,),
    type(torch.ops.higher_order.scan): (0,),
}

_ROUTES: dict[Any, Callable[..., Any]] = {
    F.dropout: functional.dropout,
    F.dropout1d: functional.dropout1d,
    F.dropout2d: functional.dropout2d,
    F.dropout3d: functional.dropout3d,
    F.alpha_dropout: functional.alpha_dropout,
    F.feature_alpha_dropout: functional.feature_alpha_dropout,
    torch.dropout: _dropout,
    torch.dropout_: _dropout_,
    torch.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout_: _alpha_dropout_,
    torch.feature_dropout: _feature_dropout,
    torch.feature_dropout_: _feature_dropout_,
    torch.feature_alpha_dropout: _feature_alpha_dropout,
    torch.feature_alpha_dropout_: _feature_alpha_dropout_,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    **{function: _copy(function) for function in _BACKWARDS},
}
