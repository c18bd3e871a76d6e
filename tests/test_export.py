"""torch.export, AOTInductor, fake and meta tensors, make_fx."""

import pytest
import torch
from family import MODULES
from helpers import TORCH_2_11, assert_same_bits, make_key, random_tensor
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dropout_ext
from dropout_ext import _reference as reference

N = 2000
SIGMA = 5


def assert_fair(mask):
    n = mask.numel()
    assert abs(mask.sum().item() - n / 2) < SIGMA * n**0.5 / 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((N,), 3.0))
        self.dropout = dropout_ext.Dropout(0.5)

    def forward(self, x):
        return self.dropout(x * self.scale)


class Keyed(Model):
    def forward(self, x, key):
        return self.dropout(x * self.scale, key=key)


def operators(graph_module):
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]


BATCH = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}


def export(model, *inputs, strict=False, dynamic=True):
    shapes = BATCH if len(inputs) == 1 else {**BATCH, "key": None}
    return torch.export.export(
        model, inputs, strict=strict, dynamic_shapes=shapes if dynamic else None
    )


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_training_mode(strict):
    x = torch.ones(3, N)
    program = export(Model(), x, strict=strict)
    assert sum("dropout_ext" in op and "apply" in op for op in operators(program.graph_module)) == 1
    module = program.module()
    for batch in (3, 5):
        first, second = (module(torch.ones(batch, N)) for _ in range(2))
        assert set(first.unique().tolist()) == {0.0, 6.0}
        assert_fair(first != 0)
        assert_fair((first != 0) ^ (second != 0))


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_eval_mode(strict):
    x = random_tensor((3, N))
    model = Model().eval()
    program = export(model, x, strict=strict)
    assert not any("dropout" in op or "rand" in op for op in operators(program.graph_module))
    assert_same_bits(program.module()(x).detach(), 3 * x)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_key(strict, key, tmp_path):
    x = random_tensor((3, N))

    def saved(key):
        return key.view(torch.int64) if TORCH_2_11 else key  # which saves no uint64

    program = export(Keyed(), x, saved(key), strict=strict)
    torch.export.save(program, tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    for seed in (1, 2):
        y = random_tensor((4, N), seed=seed)
        expected = reference.apply(3 * y, make_key(seed), 0.5, 2.0)
        assert_same_bits(module(y, saved(make_key(seed))).detach(), expected)


def test_exported_decompositions_keep_the_operator(key):
    program = export(Keyed(), random_tensor((3, N)), key).run_decompositions()
    assert sum("dropout_ext" in op for op in operators(program.graph_module)) == 1
    x = random_tensor((3, N))
    expected = reference.apply(3 * x, key, 0.5, 2.0)
    assert_same_bits(program.module()(x, key).detach(), expected)


def test_exported_train_and_eval(key):
    """export_for_training's graph draws: moving it to eval is done before the export."""
    program = export(Model(), torch.ones(3, N))
    with pytest.raises(NotImplementedError):
        program.module().eval()


class Family(nn.Module):
    """Every module at once, so that one compilation shows them all."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: make(0.5) for name, (make, _) in MODULES.items()})

    def forward(self, inputs: dict[str, torch.Tensor], key):
        return {name: layer(inputs[name], key=key) for name, layer in self.layers.items()}


def test_every_module_exports(key):
    model = Family()
    inputs = {name: random_tensor(shape) for name, (_, shape) in MODULES.items()}
    outputs = torch.export.export(model, (inputs, key)).module()(inputs, key)
    for name, y in outputs.items():
        assert_same_bits(y, model.layers[name](inputs[name], key=key))
    outputs = torch.export.export(model.eval(), (inputs, key)).module()(inputs, key)
    for name, y in outputs.items():
        assert_same_bits(y, inputs[name])


def package(program, path):
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


class Both(nn.Module):
    """A drawn key and a given one, in one compilation."""

    def __init__(self):
        super().__init__()
        self.drawn = dropout_ext.Dropout(0.5)
        self.keyed = dropout_ext.Dropout(0.5)

    def forward(self, x, key):
        return self.drawn(x), self.drawn(x), self.keyed(x * 3, key=key)


def test_aot_inductor_in_training_mode(key, tmp_path):
    with torch.no_grad():
        model = package(export(Both(), torch.ones(3, N), key), tmp_path / "model.pt2")
    for batch in (3, 5):
        x = random_tensor((batch, N))
        first, second, keyed = model(x, key)
        again, _, _ = model(x, key)
        assert_same_bits(keyed, reference.apply(3 * x, key, 0.5, 2.0))
        assert_same_bits(first, torch.where(first != 0, 2 * x, 0.0))
        assert_fair(first != 0)
        assert_fair((first != 0) ^ (second != 0))
        assert_fair((first != 0) ^ (again != 0))


def test_aot_inductor_in_eval_mode(tmp_path):
    with torch.no_grad():
        model = package(export(Model().eval(), torch.ones(3, N)), tmp_path / "model.pt2")
    x = random_tensor((5, N))
    assert_same_bits(model(x), 3 * x)


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx(tracing, key):
    def f(x, key):
        return dropout_ext.dropout(x) - dropout_ext.dropout(x), dropout_ext.dropout(x, key=key)

    x = torch.ones(N)
    graph = make_fx(f, tracing_mode=tracing)(x, key)
    for n in (N, N + 500) if tracing == "symbolic" else (N,):
        difference, keyed = graph(torch.ones(n), key)
        assert_fair(difference != 0)
        assert not torch.equal(graph(torch.ones(n), key)[0], difference)
        assert_same_bits(keyed, reference.apply(torch.ones(n), key, 0.5, 2.0))


def test_make_fx_of_a_backward(key):
    def f(x, key):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(dropout_ext.dropout(x, key=key).sum(), x)[0]

    graph = make_fx(f)(torch.ones(N), key)
    assert_same_bits(graph(torch.ones(N), key), reference.apply(torch.ones(N), key, 0.5, 2.0))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("inside", [False, True])
def test_fake_tensors(name, device, inside):
    """Fake CUDA tensors too: shapes, dtype, device, gradients; keys on the CPU."""
    make, shape = MODULES[name]
    module = make(0.5)
    mode = FakeTensorMode()
    # Autograd of a fake CUDA tensor needs a driver, whatever the operator.
    grad = device == "cpu" or torch.cuda.is_available()
    with mode:
        x = torch.empty(shape, device=device, dtype=torch.bfloat16, requires_grad=grad)
        key = torch.empty(2, dtype=torch.int64)

    def check():
        for y in (module(x), module(x, key=key)):
            assert y.fake_mode is mode
            assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
            if grad:
                y.sum().backward()
                assert x.grad.shape == x.shape and x.grad.device == x.device

    if inside:
        with mode:
            check()
    else:
        check()


def test_fake_tensors_draw_nothing():
    state = torch.get_rng_state()
    with FakeTensorMode():
        dropout_ext.dropout(torch.empty(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors(name):
    make, shape = MODULES[name]
    module = make(0.5)
    state = torch.get_rng_state()
    x = torch.empty(shape, device="meta", requires_grad=True)
    for y in (module(x), module(x, key=make_key())):
        assert y.shape == x.shape and y.device.type == "meta"
        y.sum().backward()
        assert x.grad.shape == x.shape
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.cuda
def test_aot_inductor_on_cuda(key, tmp_path):
    key = key.cuda()
    with torch.no_grad():
        program = export(Both(), torch.ones(3, N, device="cuda"), key)
        model = package(program, tmp_path / "model.pt2")
    x = random_tensor((5, N)).cuda()
    first, second, keyed = model(x, key)
    assert_same_bits(keyed, reference.apply(3 * x.cpu(), key.cpu(), 0.5, 2.0))
    assert_fair(first != 0)
    assert_fair((first != 0) ^ (second != 0))
