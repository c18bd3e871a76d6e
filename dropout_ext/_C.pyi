"""What csrc/operator/bindings.cpp and row_bindings.cpp define."""

from collections.abc import Sequence
from types import NotImplementedType
from typing import TypedDict, overload

import torch
from torch import Tensor

class BuildInfo(TypedDict):
    version: str
    mask_contract: int
    torch: str
    torch_tested: str
    compiler: str
    cuda: bool
    cuda_version: str | None
    cuda_archs: list[str]
    cpu_variant: str
    cpu_variants: list[str]

def build_info() -> BuildInfo: ...

# NotImplemented: the call is not plain.

@overload
def eager(
    input: object,
    p: float,
    training: bool,
    inplace: bool,
    key: Tensor | None,
    generator: torch.Generator | None,
    /,
) -> Tensor | NotImplementedType: ...
@overload
def eager(
    input: object,
    p: float,
    training: bool,
    inplace: bool,
    key: Tensor | None,
    generator: torch.Generator | None,
    scale: float | None,
    bias: float | None,
    dropped: float,
    mask_strides: Sequence[int] | None,
    mask_offset: int,
    /,
) -> Tensor | NotImplementedType: ...
@overload
def eager_rows(
    input: object,
    residual: Tensor | None,
    p: float,
    training: bool,
    key: Tensor | None,
    generator: torch.Generator | None,
    input_bias: Tensor | None,
    colscale: Tensor | None,
    rowscale: Tensor | None,
    mask_strides: Sequence[int] | None,
    mask_offset: int,
    sum_dtype: torch.dtype | None,
    /,
) -> Tensor | NotImplementedType: ...
@overload
def eager_rows(
    input: object,
    residual: Tensor | None,
    p: float,
    training: bool,
    key: Tensor | None,
    generator: torch.Generator | None,
    input_bias: Tensor | None,
    colscale: Tensor | None,
    rowscale: Tensor | None,
    mask_strides: Sequence[int] | None,
    mask_offset: int,
    sum_dtype: torch.dtype | None,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    dtype: torch.dtype | None,
    return_sum: bool,
    /,
) -> Tensor | tuple[Tensor, Tensor] | NotImplementedType: ...
def eager_activation(
    input: object,
    function: int,
    p: float,
    training: bool,
    key: Tensor | None,
    generator: torch.Generator | None,
    mask_strides: Sequence[int] | None,
    mask_offset: int,
    /,
) -> Tensor | NotImplementedType: ...
def draw_key(generator: torch.Generator | None, device: torch.device) -> Tensor: ...
def set_keyed(keyed: bool) -> None: ...
def check_call(
    input: Tensor,
    key: Tensor | None,
    p: float,
    bias: float | None,
    dropped: float,
    n_strides: int,
) -> None: ...
def check_rows(
    input: Tensor,
    others: Sequence[Tensor | None],
    p: float,
    n_strides: int,
    norm_dims: int | None,
    rms: bool,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None: ...
def check_writable(input: Tensor) -> None: ...
def check_generator(generator: torch.Generator | None, device: torch.device) -> None: ...
def check_fold_in(key: Tensor, n: int | torch.SymInt) -> None: ...
def check_split(key: Tensor, n: int | torch.SymInt) -> None: ...
def element_word(seed: int, offset: int, index: int, /) -> int: ...

# Only in a build with CUDA.
def _force_cuda_geometry(blocks: int, threads: int, wide: bool) -> None: ...
