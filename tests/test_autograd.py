"""Autograd around the operators: forward mode, compiled autograd, hooks, saved tensors."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from family import ALPHA, MODULES
from helpers import assert_same_bits, random_tensor
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import dropout_ext
from dropout_ext import _reference as reference
from dropout_ext import dropout

N = 1000
ops = torch.ops.dropout_ext


def factor(key, n=N):
    return reference.apply(torch.ones(n), key, 0.5, 2.0)


# The alpha modules ignore `inplace`, as in torch.nn.
@pytest.mark.parametrize(
    ("name", "inplace"),
    [(name, inplace) for name in MODULES for inplace in (False, True)[: 1 + (name not in ALPHA)]],
)
def test_derivatives_of_every_module(name, inplace, key):
    make, shape = MODULES[name]
    module = make(0.5, inplace=True) if inplace else make(0.5)
    shape = tuple(min(n, 6) for n in shape)
    x = random_tensor(shape, torch.float64).requires_grad_()

    def f(x):
        return module(x * 1, key=key)

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("drawn", [False, True])
def test_forward_mode_has_a_tangent(name, drawn, key):
    make, shape = MODULES[name]
    module = make(0.5)
    x, tangent = random_tensor(shape), random_tensor(shape, seed=1)

    def call(x):
        torch.manual_seed(2)
        return module(x) if drawn else module(x, key=key)

    slope = call(torch.ones(shape)) - call(torch.zeros(shape))
    with fwd.dual_level():
        y = fwd.unpack_dual(call(fwd.make_dual(x, tangent)))
    torch.testing.assert_close(y.primal, call(x))
    assert y.tangent is not None
    torch.testing.assert_close(y.tangent, tangent * slope)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_in_place(requires_grad, key):
    x = random_tensor((N,)).requires_grad_(requires_grad)
    tangent = random_tensor((N,), seed=1)
    with fwd.dual_level():
        dual = fwd.make_dual(x, tangent) * 3
        assert dropout(dual, inplace=True, key=key) is dual
        y = fwd.unpack_dual(dual)
        assert_same_bits(y.primal, reference.apply(3 * x.detach(), key, 0.5, 2.0))
        assert y.tangent is not None
        assert_same_bits(y.tangent, reference.apply(3 * tangent, key, 0.5, 2.0))
        if requires_grad:
            (gradient,) = torch.autograd.grad(y.primal.sum(), x)
            assert_same_bits(gradient, 3 * factor(key))


def test_forward_over_reverse(key):
    x, tangent = (random_tensor((N,), seed=s) for s in (0, 1))
    x.requires_grad_()
    with fwd.dual_level():
        y = dropout(fwd.make_dual(x, tangent), key=key).pow(3).sum()
        (gradient,) = torch.autograd.grad(y, x)
        product = fwd.unpack_dual(gradient).tangent
    torch.testing.assert_close(product, 6 * factor(key) ** 3 * x * tangent)


def test_double_backward_is_on_the_same_mask(key):
    x = random_tensor((N,)).requires_grad_()
    (gradient,) = torch.autograd.grad(dropout(x, key=key).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 6 * factor(key) ** 3 * x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_autograd(backend, key):
    torch.compiler.reset()
    graphs = []

    def compiler(graph):
        graphs.append(graph)
        return torch.compile(graph, backend=backend, fullgraph=True)

    for seed in range(3):
        key = reference.fold_in(key, seed)
        x = random_tensor((N,), seed=seed).requires_grad_()
        y = dropout(x * 3, key=key).sum()
        y = y + dropout_ext.functional.alpha_dropout(x, 0.3, True, key=key).sum()
        (expected,) = torch.autograd.grad(y, x, retain_graph=True)
        with compiled_autograd._enable(compiler):
            y.backward()
        torch.testing.assert_close(x.grad, expected)
        assert torch.equal(x.grad == 0, expected == 0)
    assert len(graphs) == 1  # a new key is no new graph


def test_compiled_autograd_of_an_eager_call_in_place_is_a_limit(key):
    """The documented limit: PyTorch's compiled autograd takes no C++ Function that marks its input
    dirty. Where this fails, PyTorch has mended it: let the limit go.
    """
    y = dropout(torch.ones(N, requires_grad=True) * 3, inplace=True, key=key).sum()
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="dirty_inputs_"),
    ):
        y.backward()


def test_compiled_autograd_of_a_compiled_function(key):
    torch.compiler.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):

        @torch.compile(backend="aot_eager")
        def train(x):
            y = dropout(x * 3, inplace=True).sum() + dropout(x, key=key).sum()
            y.backward()
            return x.grad

        x = torch.ones(N, requires_grad=True)
        gradient = train(x).clone()
    drawn = gradient - factor(key)
    assert set(drawn.unique().tolist()) == {0.0, 6.0}


def test_anomaly_mode(key):
    x = random_tensor((N,)).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        dropout(x, key=key).sum().backward()
        assert_same_bits(x.grad, factor(key))
        y = dropout(x, key=key)
        with pytest.raises(RuntimeError, match=r"returned nan values"):
            # NaN reaches what was kept.
            y.backward(torch.full((N,), torch.nan))


def test_a_dropped_nan_is_no_anomaly():
    """The gradient is selected, not multiplied: NaN does not survive a drop."""
    x = torch.ones(N, requires_grad=True)
    y = dropout(x, 1.0)
    with torch.autograd.detect_anomaly(check_nan=True):
        y.backward(torch.full((N,), torch.nan))
    assert_same_bits(x.grad, torch.zeros(N))


def test_hooks(key):
    x = random_tensor((N,)).requires_grad_()
    y = dropout(x * 1, key=key)
    seen = []
    y.register_hook(lambda g: seen.append(g.clone()) or g * 3)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(inputs[0].clone()))
    y.grad_fn.register_prehook(lambda grads: (grads[0] * 5,))
    y.sum().backward()
    assert_same_bits(x.grad, 15 * factor(key))
    assert_same_bits(seen[0], torch.ones(N))
    assert_same_bits(seen[1], 15 * factor(key))

    module = dropout_ext.Dropout()
    outputs, gradients = [], []
    module.register_forward_hook(lambda m, args, out: outputs.append(out) or out * 2)
    module.register_full_backward_hook(lambda m, gi, go: gradients.append((gi[0], go[0])))
    x = random_tensor((N,)).requires_grad_()
    z = module(x, key=key)
    assert_same_bits(z.detach(), 2 * outputs[0].detach())
    z.sum().backward()
    assert_same_bits(x.grad, 2 * factor(key))
    assert_same_bits(gradients[0][0], 2 * factor(key))


@pytest.mark.parametrize("inplace", [False, True])
def test_saved_tensor_hooks(inplace, key):
    """What is saved is the key; a backward uses what unpack gives back."""
    other = reference.fold_in(key, 1)
    packed = []

    def pack(tensor):
        packed.append(tensor.clone())
        return "the key"

    x = random_tensor((N,)).requires_grad_()
    y = x * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda name: other):
        y = dropout(y, inplace=inplace, key=key)
    assert len(packed) == 1
    assert_same_bits(packed[0], key)
    y.sum().backward()
    assert_same_bits(x.grad, factor(other))


@pytest.mark.parametrize("inplace", [False, True])
def test_save_on_cpu(inplace, key):
    x = random_tensor((N,)).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        y = dropout(x * 1, key=key, inplace=inplace)
    y.sum().backward()
    assert torch.equal(y, x * factor(key))
    assert_same_bits(x.grad, factor(key))


def test_a_key_changed_after_the_call_is_seen(key):
    """The key is saved, not copied: overwriting it is an error, not a wrong gradient."""
    x = random_tensor((N,)).requires_grad_()
    y = dropout(x, key=key)
    key.view(torch.int64).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_released_graph(key):
    x = random_tensor((N,)).requires_grad_()
    y = dropout(x, key=key).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_graph(context, key):
    x = random_tensor((N,)).requires_grad_()
    with context():
        y = dropout(x, key=key)
        assert_same_bits(y, reference.apply(x.detach(), key, 0.5, 2.0))
        assert not y.requires_grad and y.grad_fn is None
        assert y.is_inference() == (context is torch.inference_mode)
        z = y.clone()
        dropout(z, inplace=True, key=key)
        assert_same_bits(z, reference.apply(y, key, 0.5, 2.0))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_drawn_key_stays_what_it_is_for_its_graph(device):
    """Calls write to the key of the call before them once no graph holds it."""
    x = torch.ones(300, device=device, requires_grad=True)
    outputs = []
    for _ in range(4):
        outputs += [dropout(x, 0.5), dropout(x * 1, 0.5, inplace=True)]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                dropout(x, 0.5)
    for y in outputs:
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert_same_bits(gradient, y)
    masks = [y.detach() != 0 for y in outputs]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.cuda
def test_cuda(key):
    x = random_tensor((N,)).cuda().requires_grad_()
    for k in (key, key.cuda()):
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            y = dropout(x * 1, key=k)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert_same_bits(gradient, factor(key))
    with fwd.dual_level():
        y = fwd.unpack_dual(dropout(fwd.make_dual(x, torch.ones_like(x)), key=key))
        assert_same_bits(y.tangent, factor(key))


def test_p_1_in_inference_mode_leaves_no_trace():
    with torch.inference_mode():
        dropout(torch.ones(3), 1.0)
    x = torch.ones(3, requires_grad=True)
    dropout(x, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.zeros(3))


def failing_hook(tensor):
    raise ValueError("hook")


@pytest.mark.parametrize("cause", ["hook", "inference key"])
@pytest.mark.parametrize("view", [False, True])
def test_a_failed_call_in_place_changes_nothing(cause, view, key):
    x = torch.ones(8, requires_grad=True)
    base = x * 2
    y = base[:4] if view else base
    before = y.detach().clone(), y.grad_fn, y._version
    if cause == "hook":
        hooks = torch.autograd.graph.saved_tensors_hooks(failing_hook, lambda packed: packed)
        with pytest.raises(ValueError, match="hook"), hooks:
            dropout(y, key=key, inplace=True)
    else:
        with torch.inference_mode():
            key = key.clone()
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            dropout(y, key=key, inplace=True)
    assert torch.equal(y, before[0])
    assert (y.grad_fn, y._version) == before[1:]
    base.sum().backward()
    assert torch.equal(x.grad, torch.full((8,), 2.0))


@pytest.mark.parametrize("batched", [False, True], ids=["key", "key per slice"])
@pytest.mark.parametrize("sparse_dims", [1, 2])
@pytest.mark.parametrize("shape", [(40, 6), (40, 3, 2)])
def test_sparse_gradient(shape, sparse_dims, batched, key):
    """It stays sparse, with the values that a dense one has, of entries given twice too."""
    key = reference.split(key, shape[0]) if batched else key
    index = torch.tensor([[3, 0, 3, 39, 7], [2, 1, 2, 0, 0]])[:sparse_dims]
    values = random_tensor((5, *shape[sparse_dims:]), torch.float64)
    grad = torch.sparse_coo_tensor(index, values, shape, check_invariants=True)
    weight = random_tensor(shape, torch.float64).requires_grad_()
    y = dropout(weight, 0.4, key=key)
    (actual,) = torch.autograd.grad(y, weight, grad, retain_graph=True)
    (expected,) = torch.autograd.grad(y, weight, grad.to_dense())
    assert actual.is_sparse
    assert actual.sparse_dim() == sparse_dims
    assert torch.equal(actual.to_dense(), expected)


def test_gradient_of_a_sparse_embedding(key):
    index = torch.tensor([3, 0, 3, 39, 7])
    grads = []
    for sparse in (False, True):
        weight = random_tensor((40, 6)).requires_grad_()
        F.embedding(index, dropout(weight, 0.4, key=key), sparse=sparse).sum().backward()
        grads.append(weight.grad)
    assert grads[1].is_sparse
    assert torch.equal(grads[1].to_dense(), grads[0])


def test_sparse_gradient_of_nan_is_dropped(key):
    weight = torch.ones(4, 64, requires_grad=True)
    y = dropout(weight, 0.5, key=key)
    mask = y != 0
    index = torch.tensor([[1, 2]])
    values = torch.full((2, 64), torch.nan)
    y.backward(torch.sparse_coo_tensor(index, values, (4, 64), check_invariants=True))
    expected = torch.zeros(4, 64, dtype=torch.bool)
    expected[1:3] = mask[1:3]
    assert torch.equal(weight.grad.to_dense().isnan(), expected)


@pytest.mark.parametrize("saved", [ops.apply_.default, ops.apply.default])
def test_selective_checkpoint_in_place(saved, key):
    """Whatever the policy keeps, a recomputed tensor is dropped from as the first one was."""

    def choose(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is saved else CheckpointPolicy.PREFER_RECOMPUTE

    def f(x):
        return dropout(x * 2, 0.5, key=key, inplace=True).sin()

    x = random_tensor((N,)).requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    y = checkpoint(f, x, use_reentrant=False, context_fn=contexts)
    (actual,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(f(x).sum(), x)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("stride", [2**63, -(2**63), -(2**62) - 5, 2**64 - 8])
def test_strides_of_any_64_bits(stride, key):
    expected = reference.keep_mask(key, 0.5, (3, 40), [stride, 1], stride)
    place = {"mask_strides": (stride, 1), "mask_offset": stride}
    x = torch.ones(3, 40, requires_grad=True)
    y = dropout(x, key=key, **place)
    y.sum().backward()
    assert torch.equal(y != 0, expected)
    assert torch.equal(x.grad != 0, expected)
    assert torch.equal(dropout_ext.keep_mask(x.shape, 0.5, key, **place), expected)
    compiled = torch.compile(lambda x: dropout(x, key=key, **place), backend="aot_eager")
    assert torch.equal(compiled(x) != 0, expected)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "conjugate"])
def test_complex_infinities_where_dropout_is_composed(layout, key):
    """As the kernel, which scales the parts: under forward AD, and of a sparse gradient."""
    x = torch.full((6, 50), complex(torch.inf, -torch.inf))
    x[1] = complex(torch.nan, torch.inf)
    x = {
        "contiguous": lambda: x,
        "transposed": lambda: x.mT.contiguous().mT,
        "conjugate": lambda: x.conj(),
    }[layout]()
    expected = reference.apply(x, key, 0.5, 2.0)
    with fwd.dual_level():
        dual = dropout(fwd.make_dual(x, torch.ones(6, 50, dtype=x.dtype)), key=key)
        assert_same_bits(fwd.unpack_dual(dual).primal, expected)
    weight = torch.zeros(6, 50, dtype=x.dtype, requires_grad=True)
    dropout(weight, key=key).backward(x.resolve_conj().contiguous().to_sparse(1))
    assert_same_bits(weight.grad.coalesce().values(), expected)
