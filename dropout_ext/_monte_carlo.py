"""Monte Carlo dropout: predictions with dropout on, as samples of an approximate posterior.

Gal, Ghahramani, "Dropout as a Bayesian approximation", ICML 2016.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from . import _keys
from ._convert import is_dropout

__all__ = ["monte_carlo", "predict"]

# The training flag of these decides about dropout and about nothing else that changes a result. Of
# TransformerEncoderLayer it decides about the fast path, which drops nothing.
_DROP_INSIDE = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)


@contextlib.contextmanager
def monte_carlo(
    model: nn.Module, also: Sequence[nn.Module | type[nn.Module]] = ()
) -> Iterator[nn.Module]:
    """`with monte_carlo(model):` puts `model` into eval mode with its dropout on.

    On are dropout modules of any library, `nn.LSTM` and the like, and `nn.MultiheadAttention`.
    Batch norm stays in eval mode. At the end, of an exception too, every module has its own mode
    back. Each call of the model in between is one sample of an approximate posterior: Gal,
    Ghahramani, "Dropout as a Bayesian approximation", ICML 2016.

    Args:
        model (torch.nn.Module): the model, whose training flags are set.
        also (sequence of torch.nn.Module or of classes of them): what else to keep in training
            mode, such as modules that call functional dropout by their own `training`. Their
            submodules are not included. Default: ()

    Returns:
        context manager: its value is `model` itself.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), dropout_ext.Dropout(0.5)).eval()
        >>> with dropout_ext.monte_carlo(model):
        ...     [module.training for module in model]
        [False, True]
        >>> [module.training for module in model]
        [False, False]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"monte_carlo(): argument 'model' must be torch.nn.Module, not {type(model).__name__}"
        )
    types = tuple(entry for entry in also if isinstance(entry, type))
    chosen = {id(entry) for entry in also}
    # A frozen ScriptModule has no mode: it is for ever in that of its freezing.
    modes = [(m, m.training) for m in model.modules() if hasattr(m, "training")]
    try:
        for module, _ in modes:
            module.training = (
                is_dropout(module)
                or isinstance(module, _DROP_INSIDE + types)
                or id(module) in chosen
            )
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


def predict(
    model: nn.Module,
    x: Tensor,
    samples: int,
    key: Tensor | None = None,
    *,
    batch: int | None = None,
    also: Sequence[nn.Module | type[nn.Module]] = (),
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `model(x)` over `samples` draws of its dropout, without
    gradients: a prediction and its uncertainty.

    The model runs under :func:`dropout_ext.monte_carlo`, several samples in one pass as the rows of
    a larger batch. The standard deviation is that of the samples, with n - 1: Gal, Ghahramani,
    "Dropout as a Bayesian approximation", ICML 2016.

    Args:
        model (torch.nn.Module): takes `x` and returns a tensor with the batch in dimension 0,
            floating point or complex.
        x (Tensor): the input, with the batch in dimension 0.
        samples (int): how many draws, at least 2.
        key (Tensor, optional): uint64 or int64 of shape (2,), see :func:`dropout_ext.key`. It seeds
            the default generators, and those that modules of the model hold, for the time of the
            call: the same key, samples and batch give the same result, and the generators stay as
            they are. On the CPU by 32 bits only, because PyTorch's generator there takes no more.
            Default: None, draws from the generators
        batch (int, optional): samples per pass, of batch * x.shape[0] rows. Where samples share
            decisions along dimension 0 it must be 1. Default: None, all in one pass, and half as
            many as often as memory runs out
        also (sequence of torch.nn.Module or of classes of them): what else to keep in training
            mode, such as modules that call functional dropout by their own `training`. Default: ()

    Shape:
        - x: (N, *)
        - both results: the shape of `model(x)`, (N, ...)

    Returns:
        tuple of Tensor: mean and standard deviation, in the dtype of `model(x)`; the deviation of a
        complex output is real. 16-bit types are averaged in float32.

    Raises:
        TypeError: an argument of another type or dtype; an output that is no tensor, or an integer
            one.
        ValueError: `x` of no dimensions, `samples` below 2, `batch` below 1, a key of another
            shape; an output without the batch in dimension 0.

    Example:
        >>> model = torch.nn.Sequential(dropout_ext.Dropout(0.5), torch.nn.Flatten(0))
        >>> x = torch.ones(3, 1)
        >>> mean, std = dropout_ext.predict(model, x, samples=1000, key=dropout_ext.key(seed=42))
        >>> mean.shape, bool((mean - 1).abs().max() < 0.2), bool((std - 1).abs().max() < 0.2)
        (torch.Size([3]), True, True)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"predict(): argument 'x' must be Tensor, not {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError("predict(): argument 'x' has 0 dimensions, but at least 1 is needed")
    for name, value, least in (("samples", samples, 2), ("batch", batch, 1)):
        if value is None and name == "batch":
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"predict(): argument '{name}' must be int, not {type(value).__name__}")
        if value < least:
            raise ValueError(
                f"predict(): argument '{name}' is {value}, but accepted are integers from {least}"
            )
    if key is not None:
        if not isinstance(key, Tensor):
            raise TypeError(
                "predict(): argument 'key' must be a Tensor (dropout_ext.key makes one), not "
                f"{type(key).__name__}"
            )
        if key.dtype not in (torch.uint64, torch.int64):
            raise TypeError(
                f"predict(): argument 'key' has dtype {key.dtype}, but accepted are uint64 and "
                "int64"
            )
        if key.shape != (2,):
            raise ValueError(
                f"predict(): argument 'key' has shape {tuple(key.shape)}, but accepted is (2,)"
            )
    with monte_carlo(model, also), torch.no_grad():
        per_pass = min(batch or samples, samples)
        while True:
            try:
                with _seeded(model, x, key):
                    return _mean_and_std(model, x, samples, per_pass)
            except RuntimeError as error:
                if batch is not None or per_pass == 1 or not _out_of_memory(error):
                    raise
            per_pass = (per_pass + 1) // 2


def _mean_and_std(
    model: nn.Module, x: Tensor, samples: int, per_pass: int
) -> tuple[Tensor, Tensor]:
    outputs = []
    for start in range(0, samples, per_pass):
        n = min(per_pass, samples - start)
        y = model(x.repeat(n, *[1] * (x.dim() - 1)))
        if not isinstance(y, Tensor):
            raise TypeError(
                "predict(): argument 'model' must return a Tensor, not "
                f"{type(y).__name__}: wrap it in a module that does"
            )
        if y.dim() == 0 or y.size(0) != n * x.size(0):
            raise ValueError(
                f"predict(): argument 'model' returned shape {tuple(y.shape)} for {n * x.size(0)} "
                "rows, but accepted is the batch in dimension 0"
            )
        if not (y.is_floating_point() or y.is_complex()):
            raise TypeError(
                f"predict(): argument 'model' returned dtype {y.dtype}, but accepted are floating "
                "point and complex"
            )
        outputs.append(y.unflatten(0, (n, x.size(0))))
    y = torch.cat(outputs)
    compute = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    std, mean = torch.std_mean(compute, 0)
    return mean.to(y.dtype), std.to(y.dtype.to_real())


@contextlib.contextmanager
def _seeded(model: nn.Module, x: Tensor, key: Tensor | None) -> Iterator[None]:
    if key is None:
        yield
        return
    # Folded, because keys may count up and PyTorch's CPU generator reads 32 bits of a seed.
    key = _keys.fold_in(key, 0)
    devices = {t.device for t in (x, *model.parameters(), *model.buffers())}
    own = {
        id(value): value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    }
    with contextlib.ExitStack() as stack:
        # A generator of a module may be a default one: seeded again, and put back before it.
        stack.enter_context(torch.random.fork_rng([]))
        torch.default_generator.manual_seed(_seed(key))
        for device in devices - {torch.device("cpu")}:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
            with torch.get_device_module(device).device(device):
                torch.get_device_module(device).manual_seed(_seed(key))
        for i, generator in enumerate(own.values(), 1):
            stack.callback(generator.set_state, generator.get_state())
            generator.manual_seed(_seed(_keys.fold_in(key, i)))
        yield


def _seed(key: Tensor) -> int:
    return int(key[0].item()) % 2**64


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
