"""The dropout modules of a model turned into ours and back."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from . import _fuse, _paths, fused, modules
from .compat import flash_attn

__all__ = ["DropoutSummary", "SummaryRow", "convert", "dropout_summary", "revert"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: modules.Dropout,
    nn.Dropout1d: modules.Dropout1d,
    nn.Dropout2d: modules.Dropout2d,
    nn.Dropout3d: modules.Dropout3d,
    nn.AlphaDropout: modules.AlphaDropout,
    nn.FeatureAlphaDropout: modules.FeatureAlphaDropout,
}
_TORCH = {ours: torch for torch, ours in _OURS.items()}
_ALL_OURS = (*_TORCH, modules.DropPath, modules.LockedDropout)
_EXTRA = ("generator", "broadcast_dims")  # what the modules of torch.nn lack


def convert(model: nn.Module, *, fuse: bool = False) -> nn.Module:
    """Turns every dropout module of `torch.nn` in `model` into ours, in place; returns `model`; and
    DropPath and StochasticDepth of timm, torchvision and transformers, known by their code.

    Only the class of a module changes, so its identity, p, inplace, training flag, hooks, names in
    the state dict and places of use stay, and it is still an instance of its former class.
    Subclasses of `torch.nn` classes are left alone, as are scripted modules and modules whose
    instance has a `forward` of its own: `dropout_summary` lists them. Functional calls are no
    modules: see `dropout_ext.override`.

    With `fuse`, `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` and all modules whose
    `forward`, by its source, has dropout beside a sum, a sum and a layer norm, or an activation run
    these in one pass, functional dropout there included: on the CPU and CUDA, while it drops, on
    plain tensors of one dtype. The masks are those of the unfused model under `override` and the
    same seed, and results are rounded less often. Where a module in between has hooks, another
    class or a `forward` of its own, it is called as before; evaluation is the original's to the
    bit.

    A model under `torch.compile` is compiled anew at its next call; with torch 2.11, which does not
    notice, after `torch.compiler.reset()`. DistributedDataParallel and
    FSDP keep working, before and after wrapping; only a dropout module that is itself an argument
    of `fully_shard` has a class of FSDP's own by then: convert it before.

    Args:
        model (torch.nn.Module): a model of any library, or a single dropout module.
        fuse (bool): fuse dropout with its neighbours too. Default: False

    Returns:
        torch.nn.Module: `model` itself.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1))
        >>> dropout_ext.convert(model)
        Sequential(
          (0): Linear(in_features=16, out_features=32, bias=True)
          (1): Dropout(p=0.1, inplace=False)
        )
        >>> type(model[1])
        <class 'dropout_ext.modules.Dropout'>
    """
    for module in _modules("convert", model):
        if _obstacle(module) is None and (ours := _class_of_ours(module)):
            module.__class__ = ours
    for module in model.modules() if fuse else ():  # their children are converted by now
        if _obstacle(module) is None and (kind := _fuse.fused_class(module)):
            module.__class__ = kind
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes `convert`, in place; returns `model`.

    It takes modules of ours that were constructed as such for converted ones. Left alone is what
    `torch.nn` has no counterpart of: our DropPath, LockedDropout, and modules with a generator or
    with shared dimensions.

    Args:
        model (torch.nn.Module): the model, or a single dropout module.

    Returns:
        torch.nn.Module: `model` itself.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = dropout_ext.convert(torch.nn.Sequential(torch.nn.Dropout(0.1)))
        >>> type(dropout_ext.revert(model)[0])
        <class 'torch.nn.modules.dropout.Dropout'>
    """
    for module in _modules("revert", model):
        if type(module) in _TORCH and not any(vars(module).get(name) for name in _EXTRA):
            module.__class__ = _TORCH[type(module)]
        elif _fuse.is_fused(module) or _is_converted_path(module):
            kind: Any = type(module)
            module.__class__ = kind._dropout_ext_original
    return model


def _class_of_ours(module: nn.Module) -> type[nn.Module] | None:
    return _OURS.get(type(module)) or _paths.converted_class(type(module))


def _is_converted_path(module: nn.Module) -> TypeGuard[_paths.Converted]:
    kind = type(module)
    return issubclass(kind, _paths.Converted) and kind is kind._itself and module.generator is None


class SummaryRow(NamedTuple):
    """One module of a `dropout_summary`."""

    name: str  # as in named_modules()
    type: str
    p: float | None
    state: str  # "converted", "to convert", "left" or "fused"
    reason: str  # why it is left or not all of it fused, else empty


class DropoutSummary(list[SummaryRow]):
    """One row per module that drops; as a string, a table."""

    def __str__(self) -> str:
        if not self:
            return "no dropout modules"
        table = [("module", "type", "p", "state", "reason")]
        for row in self:
            table.append((row.name or "(model)", row.type, f"{row.p}", row.state, row.reason))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        )


_FUSED = (
    fused.ActivationDropout,
    fused.DropoutAdd,
    fused.DropoutAddLayerNorm,
    fused.DropoutAddRMSNorm,
    flash_attn.DropoutAddLayerNorm,
    flash_attn.DropoutAddRMSNorm,
)


def dropout_summary(model: nn.Module) -> DropoutSummary:
    """Lists the modules of `model` that drop, and what `convert` makes of each. It changes nothing.

    Modules that skip their layers by chance (LayerDrop) are listed too, by their attribute or
    configuration `layerdrop`. Functional calls in a model's own code cannot be listed.

    Args:
        model (torch.nn.Module): the model, or a single module.

    Returns:
        DropoutSummary: a list of one named tuple per module, in the order of `named_modules`, which
        `print` shows as a table. `name` and `type` say which module it is; `p` is its probability,
        None where it has none that can be read. `state` is "converted" for a module of ours, "to
        convert" for one that `convert` would turn into ours, "left" for one that it leaves, and
        "fused" for one that `convert` fused around its dropout; `reason` says why it is left, or
        not all of it fused, and is empty otherwise.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.LSTM(8, 8, num_layers=2, dropout=0.2), torch.nn.Dropout(0.1)
        ... )
        >>> print(dropout_ext.dropout_summary(model))
        module  type     p    state       reason
        0       LSTM     0.2  left        drops between its layers inside C++, out of reach
        1       Dropout  0.1  to convert
        >>> [row.name for row in dropout_ext.dropout_summary(model) if row.state == "left"]
        ['0']
    """
    rows = DropoutSummary()
    _modules("dropout_summary", model)
    for name, module in model.named_modules():
        p = None
        if isinstance(module, (*_ALL_OURS, *_FUSED)):
            state, reason = "converted", ""
        elif _fuse.is_fused(module):
            state, reason = "fused", _fuse.why_unfused(module)
        elif _class_of_ours(module):
            obstacle = _obstacle(module)
            state, reason = ("to convert", "") if obstacle is None else ("left", obstacle)
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            p = module.dropout
            if p == 0:
                continue
            state, reason = "left", _INSIDE[isinstance(module, nn.RNNBase)]
        elif is_dropout(module):
            state, reason = "left", _obstacle(module) or _foreign(module)
        elif p := _layer_drop(module):
            state, reason = "left", "skips whole layers by a draw of its own, not elements"
        else:
            continue
        if p is None:
            p = _read(module, "p", "drop_prob")
        rows.append(SummaryRow(name, type(module).__name__, p, state, reason))
    return rows


_INSIDE = {
    True: "drops between its layers inside C++, out of reach",
    False: "drops from its attention weights by a functional call: use override()",
}


def is_dropout(module: nn.Module) -> bool:
    """Whether a module drops when it trains, by its class or, for classes of other libraries, its
    name.
    """
    return isinstance(module, (_DropoutNd, modules.DropPath)) or any(
        part in _class_name(module) for part in ("dropout", *_OWN_DRAWS)
    )


# Parts of the names of modules that draw by torch.rand or Tensor.bernoulli_, which convert cannot
# replace and override does not see, and what is to be said of them.
_PATH = "draws by itself, by code that is not known: dropout_ext.DropPath drops whole samples"
_OWN_DRAWS = {
    "droppath": _PATH,
    "stochasticdepth": _PATH,
    "dropblock": "drops blocks of neighbours by a draw of its own, which nothing here does",
    "layerdrop": "skips whole layers by a draw of its own, not elements",
}


def _class_name(module: nn.Module) -> str:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return str(module.original_name if scripted else type(module).__name__).lower()


def _read(holder: object, *names: str) -> Any:
    for name in names:
        try:
            return getattr(holder, name)
        except Exception:  # a property may raise anything
            continue
    return None


def _layer_drop(module: nn.Module) -> float | None:
    """The probability with which encoders and decoders of transformers skip a layer."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    holder: Any = module
    if "layerdrop" not in vars(module):
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or "layerdrop" not in code.co_names:
            return None
        holder = _read(module, "config")
    p = _read(holder, "layerdrop")
    return p if isinstance(p, float) else None


def _foreign(module: nn.Module) -> str:
    for base in type(module).__mro__[1:]:
        if base in _OURS:
            return f"a subclass of nn.{base.__name__}, which may have its own ways"
    for part, reason in _OWN_DRAWS.items():
        if part in _class_name(module):
            return reason
    return "not a module of torch.nn"


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: convert before torch.jit.script"
    if "forward" in vars(module):
        return "its instance has a forward of its own, which a new class would not change"
    if _paths.converted_class(type(module)):
        return _paths.obstacle(module)
    return None


def _modules(function: str, model: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{function}(): argument 'model' must be torch.nn.Module, not {type(model).__name__}"
        )
    return model.modules()
