"""Modules and functions beside the rest of PyTorch: copies, pickles, tracing, workers, nesting."""

import copy
import io
import pickle

import pytest
import torch
import torch.func
from family import MODULES
from helpers import assert_same_bits, make_key, random_tensor, run_python
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, Dataset

import dropout_ext
from dropout_ext import _reference as reference

N = 1000


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, N), dropout_ext.Dropout(0.5), nn.Linear(N, 3))


def test_a_copy_has_a_generator_of_its_own():
    module = dropout_ext.Dropout(generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(module)
    x = torch.ones(N)
    assert other.generator is not module.generator
    assert_same_bits(module(x), other(x))


def test_state_dict_is_unchanged():
    ours = model()
    theirs = nn.Sequential(nn.Linear(20, N), nn.Dropout(0.5), nn.Linear(N, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not dict(dropout_ext.Dropout(generator=torch.Generator()).state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = random_tensor((4, 20))
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


def test_parametrized_weights_beside_it(key):
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    m = model()
    x = random_tensor((4, 20))
    parametrize.register_parametrization(m[0], "weight", Double())
    expected = nn.functional.linear(x, 2 * m[0].parametrizations.weight.original, m[0].bias)
    actual = m[1](m[0](x), key=key)
    assert_same_bits(actual.detach(), reference.apply(expected.detach(), key, 0.5, 2.0))


def test_dropped_weights(key):
    """Our module as a parametrization: DropConnect, Wan et al., ICML 2013."""
    linear = nn.Linear(20, N)
    weight = linear.weight.detach().clone()
    generator = torch.Generator().manual_seed(3)
    parametrize.register_parametrization(linear, "weight", dropout_ext.Dropout(generator=generator))
    generator.manual_seed(3)
    dropped = linear.weight
    expected = dropout_ext.dropout(weight, generator=torch.Generator().manual_seed(3))
    assert_same_bits(dropped.detach(), expected)
    linear.eval()
    assert_same_bits(linear.weight.detach(), weight)


@pytest.mark.parametrize("name", MODULES)
def test_symbolic_trace(name):
    """A leaf, as the modules of torch.nn are: train() and eval() of the graph reach it."""
    make, shape = MODULES[name]
    m = nn.Sequential(nn.Identity(), make(0.5))
    graph = torch.fx.symbolic_trace(m)
    assert [n.op for n in graph.graph.nodes].count("call_module") == 2
    x = random_tensor(shape)
    for module in (graph, pickle.loads(pickle.dumps(graph)) if "lambda" not in name else graph):
        torch.manual_seed(1)
        y = module(x)
        torch.manual_seed(1)
        assert_same_bits(y, m(x))
        assert torch.equal(module.eval()(x), x)
        assert not torch.equal(module.train()(x), x)


def test_symbolic_trace_of_keys_and_functions(key):
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = dropout_ext.Dropout(0.5)

        def forward(self, x, key):
            y = self.dropout(x, key=key)
            y = dropout_ext.dropout(y * 3, 0.3, self.training, key=key)
            return dropout_ext.functional.alpha_dropout(y, 0.2, self.training, key=key)

    x = random_tensor((N,))
    module = Keyed()
    graph = torch.fx.symbolic_trace(module)
    assert_same_bits(graph(x, key), module(x, key))
    assert sum(n.target is dropout_ext.dropout for n in graph.graph.nodes) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
class TestJit:
    @pytest.mark.parametrize("name", MODULES)
    def test_trace(self, name, key):
        make, shape = MODULES[name]
        module = make(0.5)
        x = random_tensor(shape)
        traced = torch.jit.trace(module, (x,), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for other in (traced, loaded):
            torch.manual_seed(1)
            y = other(x)
            torch.manual_seed(1)
            assert_same_bits(y, module(x))
            assert not torch.equal(other(x), y)
            assert other(torch.cat([x, x])).shape == (2 * shape[0], *shape[1:])
        keyed = torch.jit.trace(lambda x, k: module(x, key=k), (x, key))
        assert_same_bits(keyed(x, make_key(7)), module(x, key=make_key(7)))
        assert torch.equal(torch.jit.trace(make(0.5).eval(), (x,))(x), x)

    def test_trace_of_a_gradient(self, key):
        x = random_tensor((N,)).requires_grad_()
        traced = torch.jit.trace(lambda x, k: dropout_ext.dropout(x * 3, key=k), (x, key))
        for seed in range(3):  # the profiling executor compiles at the second call
            k = make_key(seed)
            y = traced(x, k)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert_same_bits(y.detach(), reference.apply(3 * x.detach(), k, 0.5, 2.0))
            assert_same_bits(gradient, 3 * reference.apply(torch.ones(N), k, 0.5, 2.0))

    @pytest.mark.parametrize("name", MODULES)
    def test_script_errs_and_names_the_way(self, name):
        m = nn.Sequential(nn.Linear(3, 3), MODULES[name][0](0.5))
        with pytest.raises(NotImplementedError, match=r"torch\.export or torch\.jit\.trace"):
            torch.jit.script(m)
        assert type(m[1]) is type(MODULES[name][0](0.5))  # the model is as it was

    def test_the_operator_scripts(self, key):
        """The way that works inside TorchScript."""

        @torch.jit.script
        def f(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return torch.ops.dropout_ext.apply(x, key, 0.5, 2.0, [], 0)

        x = random_tensor((N,)).requires_grad_()
        for _ in range(3):
            y = f(x, key)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert_same_bits(y.detach(), reference.apply(x.detach(), key, 0.5, 2.0))
            assert_same_bits(gradient, reference.apply(torch.ones(N), key, 0.5, 2.0))


class Drops(Dataset):
    """Augmentation by dropout in the workers."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return dropout_ext.dropout(torch.ones(256)), dropout_ext.dropout(
            torch.ones(256), key=dropout_ext.fold_in(make_key(5), i)
        )


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(context):
    """Workers differ (the loader seeds each), repeat under one seed, and agree where keyed."""
    epochs = []
    for seed in (1, 1, 2):
        loader = DataLoader(
            Drops(),
            num_workers=2,
            multiprocessing_context=context,
            generator=torch.Generator().manual_seed(seed),
        )
        batches = [[t[0] for t in batch] for batch in loader]
        epochs.append(torch.stack([drawn for drawn, _ in batches]))
        for i, (_, keyed) in enumerate(batches):
            k = reference.fold_in(make_key(5), i)
            assert_same_bits(keyed, reference.apply(torch.ones(256), k, 0.5, 2.0))
        if context == "spawn":
            break  # each worker imports torch anew, seconds
    assert len(torch.unique(epochs[0], dim=0)) == 8
    if context == "fork":
        assert torch.equal(epochs[0], epochs[1])
        assert not torch.equal(epochs[0], epochs[2])


def test_fork_repeats_and_fold_in_tells_apart():
    """fork copies the generator: children draw alike, unless told apart by fold_in."""
    out = run_python(
        """
import os, torch, dropout_ext
torch.set_num_threads(1)
torch.manual_seed(3)
x = torch.ones(256)
key = dropout_ext.key(9)
pipes = []
for i in range(2):
    r, w = os.pipe()
    if os.fork() == 0:
        drawn = dropout_ext.dropout(x)
        apart = dropout_ext.dropout(x, key=dropout_ext.fold_in(key, i))
        os.write(w, bytes(torch.cat([drawn, apart]).to(torch.uint8).tolist()))
        os._exit(0)
    os.close(w)
    pipes.append(r)
masks = [b"".join(iter(lambda: os.read(r, 4096), b"")) for r in pipes]
assert len(masks[0]) == 512
print(masks[0][:256] == masks[1][:256], masks[0][256:] == masks[1][256:],
      bytes(dropout_ext.dropout(x).to(torch.uint8).tolist()) == masks[0][:256])
"""
    )
    assert out.split() == ["True", "False", "True"]


def test_fork_after_threads(threads):
    """A parent whose intra-op threads run, and children that compute."""
    out = run_python(
        """
import os, torch, dropout_ext
torch.set_num_threads(2)
x = torch.ones(1000)
key = dropout_ext.key(9)
large = dropout_ext.dropout(torch.ones(300000), key=key)
pid = os.fork()
if pid == 0:
    ok = torch.equal(dropout_ext.dropout(x, key=key), large[:1000])
    os._exit(0 if ok else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert out.strip() == "0"


def jagged(requires_grad=False):
    rows = [random_tensor((n, 7), seed=n) for n in (3, 1, 5)]
    if requires_grad:
        rows = [row.requires_grad_() for row in rows]
    return rows, torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("module", [dropout_ext.Dropout, dropout_ext.AlphaDropout])
@pytest.mark.parametrize("compiled", [False, True])
def test_jagged_nested_tensors(module, compiled, key):
    rows, x = jagged(requires_grad=True)
    module = module(0.5)
    f = lambda x, k: module(x, key=k) + x * 0  # noqa: E731  (and its shape is that of x)
    if compiled:
        torch.compiler.reset()
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    y = f(x, key)
    assert y.is_nested and y.layout == torch.jagged
    # The mask of the values: one row after the other.
    values = torch.cat([row.detach() for row in rows])
    expected = module(values, key=key)
    torch.testing.assert_close(torch.cat(list(y.unbind())).detach(), expected, rtol=0, atol=0)
    slope = module(torch.ones(9, 7), key=key) - module(torch.zeros(9, 7), key=key)
    y.values().sum().backward()
    torch.testing.assert_close(torch.cat([row.grad for row in rows]), slope)
    torch.manual_seed(1)
    drawn = module(x)
    torch.manual_seed(1)
    assert_same_bits(drawn.values().detach(), module(values))
    assert module.eval()(x) is x


def test_jagged_in_place(key):
    rows, x = jagged()
    assert dropout_ext.dropout(x, inplace=True, key=key) is x
    expected = reference.apply(torch.cat(rows), key, 0.5, 2.0)
    assert_same_bits(torch.cat(list(x.unbind())), expected)


@pytest.mark.parametrize("module", [dropout_ext.Dropout, dropout_ext.AlphaDropout])
@pytest.mark.parametrize("compiled", [False, True])
def test_jagged_in_place_with_a_gradient(module, compiled, key):
    """alpha_dropout of the module takes no `inplace`; the function does."""
    function = {dropout_ext.Dropout: dropout_ext.dropout}.get(
        module, dropout_ext.functional.alpha_dropout
    )

    def f(x, key):
        y = x * 2
        z = function(y, 0.5, True, True, key=key)
        assert z is y
        return y.sin()  # of what was written

    rows, x = jagged(requires_grad=True)
    if compiled:
        torch.compiler.reset()
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    y = f(x, key)
    values = torch.cat([row.detach() for row in rows]).requires_grad_()
    expected = function(values * 2, 0.5, True, key=key).sin()
    assert_same_bits(y.values().detach(), expected.detach())
    y.values().sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(torch.cat([row.grad for row in rows]), values.grad)


def test_jagged_in_place_leaves_a_leaf_and_the_generator_alone():
    _, x = jagged()
    x.requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        dropout_ext.dropout(x, inplace=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_bits(x.values().detach(), before.values())
    with torch.no_grad():
        assert dropout_ext.dropout(x, inplace=True) is x
    assert not torch.equal(x.values(), before.values())


@pytest.mark.parametrize("name", [n for n in MODULES if n not in ("dropout", "alpha")])
def test_jagged_errs_where_dimensions_share(name, key):
    shape = MODULES[name][1]
    x = torch.nested.as_nested_tensor([torch.ones(shape[1:])] * 2, layout=torch.jagged)
    with pytest.raises((ValueError, RuntimeError), match=r"input\.values\(\)|nested"):
        MODULES[name][0](0.5)(x, key=key)


def test_strided_nested_tensors_err_and_name_the_way():
    x = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"torch\.jagged"):
        dropout_ext.dropout(x)


def test_sparse_tensors_err():
    with pytest.raises(TypeError, match="strided"):
        dropout_ext.dropout(torch.eye(3).to_sparse())


def test_keys_of_torch_func_random():
    """PyTorch's stateless keys, experimental there, are ours."""
    random = pytest.importorskip("torch.func._random")
    key = random.key(42)
    assert_same_bits(key, dropout_ext.key(42))
    x = torch.ones(N)
    y = dropout_ext.dropout(x, key=key)
    assert_same_bits(y, reference.apply(x, make_key(42), 0.5, 2.0))
    try:
        keys, folded = random.split(key, 3), random.fold_in(key, 5)
    except NotImplementedError:
        return  # no kernel for the CPU in this version
    assert_same_bits(keys, dropout_ext.split(key, 3))
    assert_same_bits(folded, dropout_ext.fold_in(key, 5))


@pytest.mark.cuda
def test_cuda_keys(key):
    random = pytest.importorskip("torch.func._random")
    x = torch.ones(N, device="cuda")
    expected = reference.apply(torch.ones(N), make_key(42), 0.5, 2.0)
    for k in (random.key(42, device="cuda"), make_key(42), dropout_ext.key(42, device="cuda")):
        assert_same_bits(dropout_ext.dropout(x, key=k), expected)
    k = random.key(42, device="cuda")
    assert_same_bits(random.split(k, 3), dropout_ext.split(k, 3))
    assert_same_bits(random.fold_in(k, 5), dropout_ext.fold_in(k, 5))
