"""Other libraries' signatures, held to what those libraries compute."""

import pytest
import torch
import torch.nn.functional as F
from helpers import random_tensor

import dropout_ext
from dropout_ext.compat import flash_attn, megatron

# The dtypes of flash-attention's own tests: input, residual, weight.
DTYPES = [
    (torch.float16, torch.float16, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.37])
@pytest.mark.parametrize("has_rowscale", [False, True])
@pytest.mark.parametrize("has_layerscale", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("hidden", [192, 1600])
def test_flash_attn(hidden, has_residual, has_layerscale, has_rowscale, dropout_p, prenorm, rms):
    """flash-attention's own test, on fewer hidden sizes: values and gradients against a float32
    composition with the mask that was returned; errors at most four times those of PyTorch in the
    input's dtype, as there, and a floor of its resolution.
    """
    for dtype, residual_dtype, weight_dtype in DTYPES:
        check_flash_attn(
            hidden, has_residual, has_layerscale, has_rowscale, dropout_p, prenorm, rms, dtype,
            residual_dtype, weight_dtype,
        )  # fmt: skip


def check_flash_attn(
    hidden, has_residual, has_layerscale, has_rowscale, dropout_p, prenorm, rms, dtype,
    residual_dtype, weight_dtype,
):  # fmt: skip
    x = random_tensor((2, 9, hidden), dtype, 1)
    residual = random_tensor(x.shape, residual_dtype, 2) if has_residual else None
    weight = random_tensor((hidden,), weight_dtype, 3)
    bias = None if rms else random_tensor((hidden,), weight_dtype, 4)
    layerscale = random_tensor((hidden,), weight_dtype, 5) if has_layerscale else None
    rowscale = None
    if has_rowscale:  # of stochastic depth
        kept = torch.rand(2, 9, generator=torch.Generator().manual_seed(6)) < 0.87
        rowscale = (kept / 0.87).to(dtype)
    function = flash_attn.dropout_add_rms_norm if rms else flash_attn.dropout_add_layer_norm
    in_fp32 = residual_dtype == torch.float32 and not has_residual

    def ours(x, residual, weight, bias, layerscale):
        torch.manual_seed(0)
        return function(
            x, residual, weight, bias, dropout_p, 1e-5, rowscale, layerscale, prenorm, in_fp32,
            True,
        )  # fmt: skip

    leaves = {"x": x, "residual": residual, "weight": weight, "bias": bias,
              "layerscale": layerscale}  # fmt: skip
    copies = {n: None if t is None else t.clone().requires_grad_() for n, t in leaves.items()}
    *out, mask = ours(**copies)
    assert mask.dtype == torch.uint8
    assert mask.shape == x.shape
    assert out[0].dtype == dtype
    if prenorm:
        assert out[1].dtype == residual_dtype if has_residual or in_fp32 else dtype
    if dropout_p == 0:
        assert mask.all()
    else:
        assert abs(mask.float().mean().item() - (1 - dropout_p)) < 0.03

    def composed(x, residual, weight, bias, layerscale):
        if rowscale is not None:
            x = x * rowscale.unsqueeze(-1).to(x.dtype)
        if layerscale is not None:
            x = x * layerscale.to(x.dtype)
        s = torch.where(mask.bool(), x, 0) / (1 - dropout_p)
        s = s if residual is None else s + residual
        w = weight.to(s.dtype)
        if rms:
            return F.rms_norm(s, (hidden,), w, 1e-5), s
        return F.layer_norm(s, (hidden,), w, bias.to(s.dtype), 1e-5), s

    grad = random_tensor(x.shape, torch.float32, 7)
    results = [(out, copies)]
    for wide in (dtype, torch.float64):
        others = {
            n: None if t is None else t.to(wide).clone().requires_grad_() for n, t in leaves.items()
        }
        results.append((composed(**others), others))
    compared = []
    for outputs, inputs in results:
        some = {n: t for n, t in inputs.items() if t is not None}
        grads = torch.autograd.grad(
            outputs[0], list(some.values()), grad.to(outputs[0].dtype), allow_unused=True
        )
        compared.append([outputs[0], *grads])
    for a, b, c in zip(*compared, strict=True):
        worst = (b.double() - c).abs().max()
        floor = torch.finfo(dtype).eps * c.abs().max()
        assert (a.double() - c).abs().max() <= 4 * worst + floor


def test_flash_attn_modules():
    norm = flash_attn.DropoutAddLayerNorm(16, prenorm=True, p=0.5, residual_in_fp32=True)
    assert set(norm.state_dict()) == {"weight", "bias"}
    x = random_tensor((4, 16), torch.bfloat16, 1)
    z, s = norm(x)
    assert (z.dtype, s.dtype) == (torch.bfloat16, torch.float32)
    z, s = norm.eval()(x, x)
    assert torch.equal(s, x + x)
    rms = flash_attn.DropoutAddRMSNorm(16, p=0.5).eval()
    assert set(rms.state_dict()) == {"weight"}
    y = x.float()
    torch.testing.assert_close(rms(y, y), F.rms_norm(2 * y, (16,), None, 1e-5))
    assert "p=0.5" in repr(rms)


def test_flash_attn_wrong_input():
    x, w = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="'bias' is a tensor, but accepted is None"):
        flash_attn.dropout_add_rms_norm(x, None, w, w, 0.1, 1e-5)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="between 0 and 1"):
        flash_attn.dropout_add_layer_norm(x, None, w, w, 1.5, 1e-5, return_dropout_mask=True)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_megatron(residual_dtype):
    x = random_tensor((4, 3, 32), torch.bfloat16, 1)
    bias, residual = random_tensor((32,), torch.bfloat16, 2), random_tensor(x.shape, residual_dtype)
    train = megatron.get_bias_dropout_add(True, True)
    torch.manual_seed(0)
    out = train((x, bias), residual, 0.3)
    torch.manual_seed(0)
    keep = dropout_ext.dropout(torch.ones(x.shape), 0.3) != 0
    rounded = residual.to(x.dtype).float()
    expected = torch.where(keep, (x.float() + bias.float()) / 0.7, 0) + rounded
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, expected.to(x.dtype))
    torch.manual_seed(0)
    expanded = train((x, bias.expand_as(residual)), residual, 0.3)
    torch.testing.assert_close(expanded, out, rtol=0.02, atol=0.05)
    infer = megatron.get_bias_dropout_add(False, True)
    expected = (x.float() + bias.float() + rounded).to(x.dtype)
    assert torch.equal(infer((x, bias), residual, 0.3), expected)
    assert torch.equal(infer((x, None), residual, 0.3), (x.float() + rounded).to(x.dtype))


def test_flash_attn_compiles():
    w = torch.ones(32)

    @torch.compile(fullgraph=True)
    def step(x):
        return flash_attn.dropout_add_layer_norm(x, None, w, w, 0.5, 1e-5, return_dropout_mask=True)

    _, mask = step(torch.ones(8, 32))
    assert 0 < mask.float().mean() < 1
