"""A seeded dropout in Triton, as a peer on the GPU: no mask stored, four elements per Philox call.

Triton tutorial 04 calls tl.rand, one Philox per element; randint4x is the same generator with all
four of its words in use. Contiguous CUDA tensors of a floating type.
"""

import torch
import triton
import triton.language as tl

BLOCK = 512  # Philox calls per program; each program covers four times as many elements


@triton.jit
def _dropout_kernel(x_ptr, y_ptr, n, seed, threshold, scale, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # The counter stays in 32 bits: 2^32 calls cover 2^34 elements.
    words = tl.randint4x(seed, (start + lanes).to(tl.uint32))
    for part in tl.static_range(4):
        at = start * 4 + part * BLOCK + lanes
        inside = at < n
        keep = words[part].to(tl.uint32, bitcast=True) >= threshold
        x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
        y = tl.where(keep, x * scale, 0.0)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(x, seed, p):
    y = torch.empty_like(x)
    n = x.numel()
    grid = (triton.cdiv(n, 4 * BLOCK),)
    threshold = int(p * 2**32 + 0.5)
    _dropout_kernel[grid](x, y, n, seed, threshold, 1 / (1 - p), BLOCK=BLOCK, num_warps=4)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return _launch(x, seed, p)

    @staticmethod
    def backward(ctx, gradient):
        return _launch(gradient.contiguous(), ctx.seed, ctx.p), None, None


def dropout(x, p):
    """Drop with 0 < p < 1; the seed comes from the CPU generator."""
    return _Dropout.apply(x, p, int(torch.randint(2**31 - 1, (1,))))


def check(dtype):
    """AssertionError unless rate, values and the gradient's mask are right."""
    x = torch.ones(2**20 + 3, device="cuda", dtype=dtype, requires_grad=True)
    p = 0.1
    y = dropout(x, p)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, gradient)
    kept = y != 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    rate = 1 - kept.double().mean().item()
    assert abs(rate - p) < 6 * (p * (1 - p) / x.numel()) ** 0.5, rate
