"""Functions of tensors that what stands for a tensor can override, as it can those of torch.nn."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._call import check_tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])


def overridden(function: Callable[..., Tensor], input: Any, arguments: dict[str, Any]) -> Any:
    """The call as the `__torch_function__` of `input` has it, all arguments by keyword."""
    if isinstance(input, torch.fx.Proxy) and input.tracer.module_stack:
        # A module of ours is a leaf of torch.fx.symbolic_trace, as those of torch.nn are, so that
        # train() and eval() still reach it.
        path, kind = next(reversed(input.tracer.module_stack.values()))
        if getattr(kind, "__module__", None) == f"{__package__}.modules":
            key = {} if arguments["key"] is None else {"key": arguments["key"]}
            return input.tracer.create_proxy("call_module", path, (input,), key)
    return handle_torch_function(function, (input,), input, **arguments)


def overridable(function: Function) -> Function:
    """A function of tensors that first asks what stands for one, as those of torch.nn do."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def public(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if has_torch_function_unary(input) and len(args) <= len(positional):
            given = dict(zip(positional, args, strict=False))
            return overridden(public, input, defaults | given | kwargs)
        check_tensor(input)
        return function(input, *args, **kwargs)

    return cast(Function, public)
