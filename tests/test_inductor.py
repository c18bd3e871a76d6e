"""Dropout in the loops that Inductor writes: eager's masks, whatever comes before and after."""

import contextlib
import functools
import sys
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL_DTYPES,
    FLOAT_DTYPES,
    LAYOUTS,
    assert_same_bits,
    random_tensor,
    run_python,
)
from torch.utils.checkpoint import checkpoint

import dropout_ext
from dropout_ext import _inductor, functional
from dropout_ext import _reference as reference

P = 0.3


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    """Wherever it can be done: the rule leaves tensors as small as these alone."""
    monkeypatch.setenv(_inductor.SWITCH, "always")
    torch.compiler.reset()
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def compiled(function, dynamic=False):
    return torch.compile(function, fullgraph=True, dynamic=dynamic)


def operators(function, *inputs):
    """How often each of ours is called once all is compiled, and what the function returns."""
    function(*inputs)
    with torch.autograd.profiler.profile() as profile:
        out = function(*inputs)
    names = Counter(e.name for e in profile.function_events if e.name.startswith("dropout_ext::"))
    return {name.removeprefix("dropout_ext::"): n for name, n in names.items()}, out


# name: (shape, call)
FAMILY = {
    "dropout": ((6, 50), functional.dropout),
    "shared": ((6, 50), lambda x, p, key: functional.dropout(x, p, broadcast_dims=(0,), key=key)),
    "shard": (
        (5, 7),
        lambda x, p, key: functional.dropout(x, p, mask_strides=(90, 1), mask_offset=13, key=key),
    ),
    "reversed": (
        (5, 7),
        lambda x, p, key: functional.dropout(x, p, mask_strides=(-7, -1), mask_offset=3, key=key),
    ),
    "dropout1d": ((3, 4, 5), functional.dropout1d),
    "dropout2d": ((3, 4, 5, 2), functional.dropout2d),
    "dropout3d": ((3, 4, 5, 2, 2), functional.dropout3d),
    "drop_path": ((40, 3), functional.drop_path),
    "locked_dropout": ((4, 6, 5), lambda x, p, key: functional.locked_dropout(x, p, 1, key=key)),
    "alpha_dropout": ((6, 50), lambda x, p, key: functional.alpha_dropout(x, p, True, key=key)),
    "feature_alpha_dropout": (
        (3, 4, 5),
        lambda x, p, key: functional.feature_alpha_dropout(x, p, True, key=key),
    ),
    "scalar": ((), functional.dropout),
    "key per slice": (
        (3, 4, 11),
        lambda x, p, key: functional.dropout(x, p, key=dropout_ext.split(key, 3)),
    ),
}
OPAQUE_FORWARD = ("alpha_dropout", "feature_alpha_dropout", "scalar")


def test_the_family(key):
    calls = [call for _, call in FAMILY.values()]
    f = compiled(lambda xs, key: [call(x, P, key=key) for x, call in zip(xs, calls, strict=True)])
    inputs = [
        random_tensor(shape, special=True, seed=i) for i, (shape, _) in enumerate(FAMILY.values())
    ]
    grads = [random_tensor(x.shape, special=True, seed=50) for x in inputs]
    xs = [x.requires_grad_() for x in inputs]
    counts, out = operators(f, xs, key)
    assert counts["apply"] == len(OPAQUE_FORWARD)
    assert counts["keep_bits"] >= len(FAMILY) - len(OPAQUE_FORWARD) - 1
    counts, actual = operators(lambda: torch.autograd.grad(out, xs, grads, retain_graph=True))
    assert counts["apply"] == 1  # of a scalar
    ours = [x.detach().requires_grad_() for x in xs]
    expected = [call(x, P, key=key) for x, call in zip(ours, calls, strict=True)]
    for y, z in zip(out, expected, strict=True):
        assert_same_bits(y, z)
    for y, z in zip(actual, torch.autograd.grad(expected, ours, grads), strict=True):
        assert_same_bits(y, z)


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dtypes(p, key):
    inputs = [random_tensor((9, 41), dtype, special=True) for dtype in ALL_DTYPES]
    apply = torch.ops.dropout_ext.apply
    for xs, dropped in ((inputs, 0.0), (inputs[: len(FLOAT_DTYPES)], -0.25)):
        rest = (key, p, 1.7, [41, 1], 5, None, dropped)
        f = compiled(lambda xs, rest=rest: [apply(x, *rest) for x in xs])
        for y, x in zip(f(xs), xs, strict=True):
            assert_same_bits(y, reference.apply(x, *rest))


def test_layouts(key):
    x = random_tensor((4, 3, 6, 5))
    xs = [layout(x) for layout in LAYOUTS.values()]

    def both(xs, key):
        return [d(x, P, key=key) for x in xs for d in (functional.dropout, functional.dropout2d)]

    f = compiled(both)
    for y, expected in zip(f(xs, key), both(xs, key), strict=True):
        assert_same_bits(y, expected)
        assert y.stride() == expected.stride()


def test_sizes_without_recompiling(key):
    """And whatever is around: the mask is that of eager code, forward and backward."""

    def block(x, residual, key):
        y = functional.dropout(F.relu(x), P, key=key)
        return F.layer_norm(residual + y, (x.shape[-1],)), y

    f = compiled(block, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((9, 41), (2, 2), (16, 64), (40, 1001), (3, 7)):
            x = random_tensor(shape).abs().requires_grad_()
            residual = random_tensor(shape, seed=1).requires_grad_()
            counts, (z, y) = operators(f, x, residual, key)
            assert counts == {"keep_bits": 1}
            keep = reference.keep_mask(key, P, shape)
            assert torch.equal(y != 0, keep)
            expected = block(x, residual, key)
            torch.testing.assert_close(z, expected[0])
            grads = random_tensor(shape, seed=2), torch.zeros(shape)
            actual = torch.autograd.grad((z, y), (x, residual), grads)
            assert not actual[0][~keep].any()
            expected = torch.autograd.grad(expected, (x, residual), grads)
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place(dtype, monkeypatch, key):
    """After a loop and before none: what others read of that loop is not written to."""
    monkeypatch.setenv(_inductor.SWITCH, "auto")

    def calls(x, key):
        h = F.relu(x)
        y, z = functional.dropout(h, P, key=key), functional.dropout(h.t(), P, key=key)
        return h, y, z, functional.alpha_dropout(h, P, True, key=key), h @ h.t()

    f = compiled(calls, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((9, 41), (40, 50)):
            x = random_tensor(shape, dtype).requires_grad_()
            counts, out = operators(f, x, key)
            assert counts == {"apply_": 3}
            expected = calls(x, key)
            for actual, wanted in zip(out, expected, strict=True):
                assert_same_bits(actual, wanted)
                assert actual.stride() == wanted.stride()
            grads = [random_tensor(y.shape, dtype, seed=1) for y in out]
            torch.testing.assert_close(
                torch.autograd.grad(out, x, grads),
                torch.autograd.grad(expected, x, grads),
                atol=1e-5 if dtype == torch.float32 else 0.1,
                rtol=1e-5 if dtype == torch.float32 else 0.05,
            )


@contextlib.contextmanager
def bits_instead_of_bytes(monkeypatch):
    from dropout_ext import _inductor_lowering as ours

    with torch.library._scoped_library("dropout_ext_test", "DEF") as library:
        schema = "Tensor key, float p, SymInt[] size, SymInt[] mask_strides, SymInt mask_offset"
        library.define(f"packed({schema}, *, Device device) -> Tensor")

        def pack(*args, device):
            return reference.pack(reference.keep_mask(*args).to(torch.uint8))

        library.impl("packed", pack, "CompositeExplicitAutograd")
        monkeypatch.setattr(ours, "in_bytes", lambda device: False)
        monkeypatch.setattr(ours, "KEEP_BITS", torch.ops.dropout_ext_test.packed.default)
        yield


@pytest.mark.parametrize("dynamic", [False, True])
def test_bits(dynamic, monkeypatch, key):
    """What is read on CUDA, read on the CPU."""

    def calls(x, key):
        return (
            functional.dropout(x, P, key=key) + 1,
            functional.dropout(x.transpose(0, 2), P, key=key) + 1,
            functional.dropout(x, P, broadcast_dims=(1,), key=key) + 1,
        )

    x = random_tensor((5, 6, 7))
    expected = calls(x, key)
    with bits_instead_of_bytes(monkeypatch):
        counts, out = operators(compiled(calls, dynamic), x, key)
    assert not counts
    for y, z in zip(out, expected, strict=True):
        assert_same_bits(y, z)


def saved_by(function, *inputs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = function(*inputs)
    return saved, out


def test_the_key_is_saved(key):
    """Given, drawn, and where what comes next saves its input."""
    x = random_tensor((9, 41)).requires_grad_()
    given = compiled(lambda x, key: functional.dropout(x * 3, P, key=key) + 1)
    drawn = compiled(lambda x: functional.dropout(x * 3, P) + 1)
    for f, inputs in ((given, (x, key)), (drawn, (x,))):
        saved, out = saved_by(f, *inputs)
        assert [t.numel() * t.element_size() for t in saved] == [16]
        backward = functools.partial(torch.autograd.grad, out.sum(), x, retain_graph=True)
        counts, (gradient,) = operators(backward)
        assert counts == {"keep_bits": 1}
        assert torch.equal(gradient != 0, out != 1)
    f = compiled(lambda x, key: F.gelu(functional.dropout(x, P, key=key)))
    saved, _ = saved_by(f, x, key)
    assert sorted(t.numel() * t.element_size() for t in saved) == [16, x.numel() * 4]


def test_each_call_has_a_new_mask():
    f = compiled(lambda x: functional.dropout(x) - functional.dropout(x))
    x = torch.ones(4000, requires_grad=True)
    out = [f(x) for _ in range(3)]
    for y in out:
        assert 1700 < (y != 0).sum() < 2300  # nine standard deviations
        assert_same_bits(torch.autograd.grad(y.sum(), x)[0], y.detach())
    for i in range(3):
        for j in range(i):
            assert ((out[i] != 0) ^ (out[j] != 0)).sum() > 1700


@pytest.mark.parametrize("where", ["checkpoint", "budget"])
def test_recomputed(where, key):
    def layer(x, w, key):
        return functional.dropout(F.gelu(x @ w), P, key=key) * 2

    def model(x, w, key):
        for i in range(2):
            k = dropout_ext.fold_in(key, i)
            if where == "checkpoint":
                x = checkpoint(layer, x, w, k, use_reentrant=False)
            else:
                x = layer(x, w, k)
        return x

    # In float64, where gelu's own rounding, vectorised or not, is far below what a wrong mask does.
    x, w = (random_tensor((n, 16), torch.float64).requires_grad_() for n in (8, 16))
    budget = 0.1 if where == "budget" else 1.0
    with torch._functorch.config.patch(activation_memory_budget=budget):
        counts, y = operators(compiled(model), x, w, key)
        assert counts["keep_bits"] == 2
        assert "apply" not in counts
        actual = torch.autograd.grad(y.square().sum(), (x, w))
    expected = torch.autograd.grad(model(x, w, key).square().sum(), (x, w))
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("switch", "calls"), [("always", "keep_bits"), ("auto", "apply_")])
def test_export_and_ahead_of_time(switch, calls, tmp_path, monkeypatch, key):
    monkeypatch.setenv(_inductor.SWITCH, switch)

    class Model(torch.nn.Module):
        def forward(self, x, key):
            return functional.dropout(x + 1, P, key=key)

    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        Model(), (random_tensor((8, 33)), key), dynamic_shapes={"x": {0: batch}, "key": None}
    )
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    model = torch._inductor.aoti_load_package(path)
    for n in (8, 5):
        x = random_tensor((n, 33))
        counts, y = operators(model, x, key)
        assert counts == {calls: 1}
        assert_same_bits(y, Model()(x, key))


def test_the_rule(monkeypatch, key):
    from dropout_ext import _inductor_lowering as ours

    monkeypatch.setenv(_inductor.SWITCH, "auto")
    x, w = random_tensor((16, 16)), random_tensor((16, 16))

    def d(x):
        return functional.dropout(x, P, key=key)

    opaque, fused, in_place = {"apply": 1}, {"keep_bits": 1}, {"apply_": 1}
    for function, expected in (
        (d, opaque),
        (lambda x: d(x @ w) @ w, opaque),
        (lambda x: d(x @ w) + 1, fused),
        (lambda x: d(F.relu(x)) + 1, fused),
        (lambda x: d(F.relu(x)) @ w, in_place),
        (lambda x: d(F.relu(x).t()).t().view(-1), in_place),
        (lambda x: d(x @ w).view(4, 64).t().sum(0), fused),
        (lambda x: d(x.bfloat16()) + 1, opaque),
        (lambda x: d(x.bfloat16()), in_place),
    ):
        torch.compiler.reset()
        monkeypatch.setattr(ours, "CPU_BYTES", 0)
        monkeypatch.setattr(ours, "loads_bytes", lambda: True)
        assert operators(compiled(function), x)[0] == expected
    torch.compiler.reset()
    monkeypatch.undo()
    assert operators(compiled(lambda x: d(x) + 1), x)[0] == opaque  # in the cache


@torch.compiler.config.patch(force_disable_caches=False)
def test_the_switch_is_in_the_keys_of_the_caches(monkeypatch, tmp_path, key):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = random_tensor((9, 41))

    def f(x, key):
        return functional.dropout(x * 2, P, key=key) + 1

    for value, expected in (
        ("always", {"keep_bits": 1}),
        ("never", {"apply": 1}),
        ("always", {"keep_bits": 1}),
    ):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setenv(_inductor.SWITCH, value)
        assert operators(compiled(f), x, key)[0] == expected
    hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    assert hits == 1  # of the last, in what the first has stored


def test_the_tag_of_others_stays(monkeypatch):
    with torch.compiler.config.patch(cache_key_tag="theirs"):
        for value in ("always", "never", "never"):
            monkeypatch.setenv(_inductor.SWITCH, value)
            _inductor.prepare()
            tag = torch.compiler.config.cache_key_tag
            assert tag.startswith("theirs|dropout_ext-")
            assert tag.endswith(value)
            assert tag.count("|") == 1


def test_a_wrong_switch_errs(monkeypatch):
    monkeypatch.setenv(_inductor.SWITCH, "1")
    with pytest.raises(ValueError, match="DROPOUT_EXT_INDUCTOR is '1', but accepted are 'auto'"):
        _inductor.prepare()


def test_another_inductor(monkeypatch, key):
    """One warning, and the operator as it is."""
    from dropout_ext import _inductor_lowering as ours

    def changed(*args, **kwargs):
        raise TypeError("make_pointwise() takes no function any more")

    monkeypatch.setattr(ours.lowering, "make_pointwise", changed)
    x = random_tensor((9, 41))

    def twice(x):
        return [functional.dropout(x, p, key=key) for p in (0.3, 0.4)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        counts, out = operators(compiled(twice), x)
    ours = [w for w in caught if "dropout_ext" in str(w.message)]
    assert len(ours) == 1
    assert "takes no function any more" in str(ours[0].message)
    assert counts == {"apply": 2}
    for y, expected in zip(out, twice(x), strict=True):
        assert_same_bits(y, expected)


def test_a_missing_inductor(monkeypatch):
    monkeypatch.setitem(sys.modules, "dropout_ext._inductor_lowering", None)
    monkeypatch.delattr(dropout_ext, "_inductor_lowering", raising=False)
    monkeypatch.setitem(sys.modules, "torch._inductor.lowering", object())
    with pytest.warns(UserWarning, match="Inductor is not the one"):
        _inductor._register.__wrapped__()


def test_inductor_is_not_imported():
    code = "import sys, dropout_ext; print([m for m in sys.modules if 'nductor' in m])"
    before = run_python(code.replace("dropout_ext", "torch"))
    assert run_python(code).strip() == before.strip().replace("]", ", 'dropout_ext._inductor']")


def test_registered_after_an_opaque_compilation(key):
    """Which leaves notes of the operator in Inductor."""
    from dropout_ext import _inductor_lowering as ours

    ours.lowering.make_fallback(ours.APPLY, warn=False)
    ours.register()
    x = random_tensor((9, 41))
    y = compiled(lambda x, key: functional.dropout(x * 2, P, key=key) + 1)
    counts, _ = operators(y, x, key)
    assert counts == {"keep_bits": 1}
    assert ours.APPLY not in ours.lowering.needs_realized_inputs
