"""convert(fuse=True): what is fused computes what it did before, and calls what others attached."""

import copy
import functools
import pickle

import pytest
import torch
from helpers import assert_same_bits, make_key, random_tensor
from test_convert import Operators
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as nn_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dropout_ext
from dropout_ext import _fuse

H = 16


class SelfOutput(nn.Module):
    """As BERT's in transformers."""

    def __init__(self, p=0.4):
        super().__init__()
        self.dense = nn.Linear(H, H)
        self.LayerNorm = nn.LayerNorm(H, eps=1e-12)
        self.dropout = nn.Dropout(p)

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states + input_tensor)
        return hidden_states


class Renamed(SelfOutput):
    def forward(self, hidden, input_tensor):
        """Other names of what is local."""
        hidden = self.dense(hidden)
        hidden = self.dropout(hidden)
        hidden = self.LayerNorm(hidden + input_tensor)
        return hidden


class Other(SelfOutput):
    def forward(self, hidden_states, input_tensor):
        hidden_states = self.dense(hidden_states)
        hidden_states = self.dropout(hidden_states)
        hidden_states = self.LayerNorm(hidden_states - input_tensor)
        return hidden_states


def encoder(**options):
    return nn.TransformerEncoderLayer(H, 2, 32, 0.4, batch_first=True, **options)


def decoder(**options):
    return nn.TransformerDecoderLayer(H, 2, 32, 0.4, batch_first=True, **options)


# What to build, of how many inputs, and the fused operators in it.
CASES = {
    "encoder": (encoder, 1, {"add_norm", "activation"}),
    "encoder, norm first": (
        functools.partial(encoder, norm_first=True),
        1,
        {"add_norm", "add", "activation"},
    ),
    "encoder, gelu": (
        functools.partial(encoder, activation="gelu"),
        1,
        {"add_norm", "activation"},
    ),
    "encoder, elu, no bias": (
        functools.partial(encoder, activation=nn.functional.elu, bias=False),
        1,
        {"add_norm", "apply"},
    ),
    "decoder": (decoder, 2, {"add_norm", "activation"}),
    "decoder, norm first": (
        functools.partial(decoder, norm_first=True),
        2,
        {"add_norm", "add", "activation"},
    ),
    "SelfOutput": (SelfOutput, 2, {"add_norm"}),
    "renamed": (Renamed, 2, {"add_norm"}),
}
each_case = pytest.mark.parametrize("name", CASES)


def pair(name, dtype=torch.float32):
    """One model, converted and fused, and its inputs."""
    build, n, _ = CASES[name]
    model = build().to(dtype)
    inputs = [random_tensor((3, 5, H), dtype, seed=i) for i in range(n)]
    unfused = dropout_ext.convert(copy.deepcopy(model))
    return unfused, dropout_ext.convert(model, fuse=True), inputs


def ours(call):
    """The operators that drop."""
    with Operators() as operators:
        call()
    parts = [name.split("::")[1] for name in operators.names if name.startswith("dropout_ext::")]
    names = {part.split(".")[0] for part in parts}
    return {name for name in names if "backward" not in name} - {"attention"}


def step(model, inputs, **options):
    """Output, gradients and what is left of the generator, after a seed."""
    torch.manual_seed(5)
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.zero_grad()
    y = model(*inputs, **options)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters()]
    return [y.detach(), *(x.grad for x in inputs), *grads], torch.get_rng_state()


def assert_close(actual, expected):
    for a, b in zip(actual[0], expected[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    assert torch.equal(actual[1], expected[1])


@each_case
def test_masks_are_those_of_the_unfused_model(name):
    """In float64 nothing but another mask makes a difference as large as 1e-9."""
    unfused, fused, inputs = pair(name, torch.float64)
    assert_close(step(fused, inputs), step(unfused, inputs))
    with dropout_ext.override():
        assert_close(step(fused, inputs), step(unfused, inputs))


@each_case
def test_fused_operators_run(name):
    unfused, fused, inputs = pair(name)
    assert ours(lambda: fused(*inputs)) == CASES[name][2]
    assert ours(lambda: unfused(*inputs)) == {"apply"}
    for a, b in zip(step(fused, inputs)[0], step(unfused, inputs)[0], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@each_case
def test_evaluation_is_the_original_to_the_bit(name):
    unfused, fused, inputs = pair(name)
    original = dropout_ext.revert(copy.deepcopy(unfused)).eval()
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            expected = original(*inputs)
            assert_same_bits(fused.eval()(*inputs), expected)
    for drop in fused.modules():
        if isinstance(drop, dropout_ext.Dropout):
            drop.p = 0.0
    dropout_ext.convert(fused.train())
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    for module in fused.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    assert_same_bits(fused(*inputs), original.train()(*inputs))


def test_masks_and_causality_reach_the_attention():
    unfused, fused, (x,) = pair("encoder", torch.float64)
    length = x.shape[1]
    options = {
        "src_mask": nn.Transformer.generate_square_subsequent_mask(length, dtype=x.dtype),
        "src_key_padding_mask": torch.arange(length).expand(3, -1) > 3,
        "is_causal": True,
    }
    assert_close(step(fused, [x], **options), step(unfused, [x], **options))
    unfused, fused, inputs = pair("decoder", torch.float64)
    padding = options["src_key_padding_mask"]
    options = {
        "tgt_mask": options["src_mask"],
        "memory_mask": options["src_mask"],
        "tgt_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
        "tgt_is_causal": True,
    }
    assert_close(step(fused, inputs, **options), step(unfused, inputs, **options))


class Counted(nn.LayerNorm):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def own_forward(module, note):
    forward = module.forward

    def counting(*args):
        note()
        return forward(*args)

    module.forward = counting


def own_compiled_call(module, note):
    """As module.compile() leaves it."""

    def counting(*args):
        note()
        return module._call_impl(*args)

    module._compiled_call_impl = counting


# What attaches itself to a child, so that `note` is called when the child is.
ATTACHED = {
    "forward hook": lambda m, note: m.register_forward_hook(lambda *_: note()),
    "forward pre-hook": lambda m, note: m.register_forward_pre_hook(lambda *_: note()),
    "backward hook": lambda m, note: m.register_full_backward_hook(lambda *_: note()),
    "backward pre-hook": lambda m, note: m.register_full_backward_pre_hook(lambda *_: note()),
    "forward of its own": own_forward,
    "compiled": own_compiled_call,
}
GLOBAL = {
    "forward hook": nn_module.register_module_forward_hook,
    "forward pre-hook": nn_module.register_module_forward_pre_hook,
    "backward hook": nn_module.register_module_full_backward_hook,
    "backward pre-hook": nn_module.register_module_full_backward_pre_hook,
}


def assert_same_steps(unfused, fused, inputs):
    actual, expected = step(fused, inputs), step(unfused, inputs)
    for a, b in zip(actual[0], expected[0], strict=True):
        assert_same_bits(a, b)
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("child", ["dropout", "LayerNorm"])
@pytest.mark.parametrize("how", ATTACHED)
def test_what_is_attached_to_a_child_is_called(child, how):
    unfused, fused, inputs = pair("SelfOutput")
    calls = []
    for model in (unfused, fused):
        ATTACHED[how](getattr(model, child), lambda model=model: calls.append(model))
    assert_same_steps(unfused, fused, inputs)
    assert calls.count(fused) == calls.count(unfused) > 0
    assert ours(lambda: fused(*inputs)) == {"apply"}
    row = dropout_ext.dropout_summary(fused)[0]
    assert row.state == "fused"
    assert child in row.reason


@pytest.mark.parametrize("how", GLOBAL)
def test_hooks_of_all_modules_are_called(how):
    unfused, fused, inputs = pair("SelfOutput")
    calls = []
    handle = GLOBAL[how](lambda module, *_: calls.append(type(module).__name__))
    try:
        assert_same_steps(unfused, fused, inputs)
    finally:
        handle.remove()
    for name in ("Linear", "Dropout", "LayerNorm", "SelfOutput"):
        assert calls.count(name) == 2


def test_a_child_of_another_class_is_called():
    unfused, fused, inputs = pair("SelfOutput")
    fused.LayerNorm.__class__ = Counted
    assert_same_steps(unfused, fused, inputs)
    assert Counted.calls == 1
    _, fused, inputs = pair("SelfOutput")
    fused.dropout = nn.Dropout(0.4)
    assert ours(lambda: fused(*inputs)) == set()


def test_methods_of_an_instance_are_called():
    for name in ("encoder", "decoder"):
        unfused, fused, inputs = pair(name)
        for model in (unfused, fused):
            model._ff_block = torch.neg
            torch.manual_seed(5)
            model.expected = model(*inputs)
        assert_same_bits(fused.expected, unfused.expected)


OPERANDS = {
    "wider": ((3, 5, H), torch.float64),
    "narrower": ((3, 5, H), torch.bfloat16),
    "broadcast": ((1, H), torch.float32),
}


@pytest.mark.parametrize("how", OPERANDS)
def test_operands_that_differ(how):
    shape, dtype = OPERANDS[how]
    unfused, fused, (x, _) = pair("SelfOutput")
    residual = random_tensor(shape, dtype)
    if how == "wider":  # the norm takes no two dtypes: the original's error
        for model in (unfused, fused):
            with pytest.raises(RuntimeError, match=r"expected scalar type|mixed dtype"):
                model(x, residual)
        return
    assert_same_steps(unfused, fused, [x, residual])


def test_autocast():
    for name in CASES:
        unfused, fused, inputs = pair(name)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(5)
            expected = unfused(*inputs)
            torch.manual_seed(5)
            assert_same_bits(fused(*inputs), expected)


def test_devices_without_kernels(monkeypatch):
    _, fused, inputs = pair("SelfOutput")
    monkeypatch.setattr(_fuse, "_KERNELS", ("cuda",))
    assert ours(lambda: fused(*inputs)) == {"apply"}


def test_operands_on_two_devices():
    """No GPU is needed to tell that they are not one call."""
    here, there = torch.ones(2), torch.ones(2, device="meta")
    assert _fuse._one_type(here, here)
    assert not _fuse._one_type(here, there)
    assert not _fuse._one_type(there, there)


@pytest.mark.cuda
@each_case
@sdpa_kernel(SDPBackend.MATH)
def test_on_cuda(name):
    """As the unfused model there, to 1e-9 in float64, and by the fused operators."""
    models = [model.cuda() for model in pair(name, torch.float64)[:2]]
    inputs = [x.cuda() for x in pair(name, torch.float64)[2]]
    results = []
    for model in models:
        torch.cuda.manual_seed(5)
        results.append((step(model, inputs)[0], torch.cuda.get_rng_state()))
    assert_close(*results)
    fused = models[1].float()
    inputs = [x.float() for x in inputs]
    assert ours(lambda: fused(*inputs)) == CASES[name][2]
    with torch.autocast("cuda", torch.bfloat16):
        assert ours(lambda: fused(*inputs)) == {"apply"}


def test_generators_and_shared_dimensions_of_the_dropout():
    unfused, fused, inputs = pair("SelfOutput", torch.float64)
    for model in (unfused, fused):
        model.dropout.generator = torch.Generator().manual_seed(3)
        model.dropout.broadcast_dims = (1,)
    assert_close(step(fused, inputs), step(unfused, inputs))


@each_case
def test_fx(name):
    unfused, fused, inputs = pair(name)
    traced = torch.fx.symbolic_trace(nn.Sequential(fused) if len(inputs) == 1 else fused)
    torch.manual_seed(5)
    expected = unfused(*inputs)
    torch.manual_seed(5)
    assert torch.allclose(traced(*inputs), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(traced.eval()(*inputs), unfused.eval()(*inputs))


@each_case
def test_compiled(name):
    torch.compiler.reset()
    _, fused, inputs = pair(name, torch.float64)
    expected = step(fused, inputs)
    compiled = copy.deepcopy(fused)
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_close(step(compiled, inputs), expected)


@each_case
def test_checkpoints(name):
    _, fused, inputs = pair(name, torch.float64)
    expected = step(fused, inputs)
    for reentrant in (False, True):
        model = copy.deepcopy(fused)
        forward = functools.partial(checkpoint, model, use_reentrant=reentrant)
        torch.manual_seed(5)
        xs = [x.clone().requires_grad_() for x in inputs]
        forward(*xs).square().sum().backward()
        grads = [x.grad for x in xs] + [p.grad for p in model.parameters()]
        for a, b in zip(grads, expected[0][1:], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@each_case
def test_keys_by_name(name):
    unfused, fused, inputs = pair(name, torch.float64)
    results = []
    for model in (unfused, fused):
        with dropout_ext.override(), dropout_ext.keys(make_key(), model):
            results.append(step(model, inputs))
    assert_close(*results)


@each_case
def test_copies_and_back(name, tmp_path):
    unfused, fused, inputs = pair(name, torch.float64)
    expected = step(fused, inputs)
    torch.save(fused, tmp_path / "model.pt")
    for twin in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert type(twin) is type(fused)
        assert ours(lambda twin=twin: twin(*inputs)) >= {"add_norm"}
        assert_close(step(twin, inputs), expected)
    assert fused.state_dict().keys() == unfused.state_dict().keys()
    kind = type(fused)
    assert type(dropout_ext.convert(fused, fuse=True)) is kind
    assert isinstance(fused, type(unfused))
    assert type(dropout_ext.revert(fused)) is type(unfused)
    assert ours(lambda: fused(*inputs)) == set()


def test_what_is_not_known_stays():
    scripted = torch.jit.script(encoder())
    odd = SelfOutput()
    odd.forward = odd.forward
    for model in (Other(), scripted, odd, nn.LayerNorm(4)):
        before = type(model)
        dropout_ext.convert(model, fuse=True)
        assert type(model) is before
    assert type(dropout_ext.convert(SelfOutput())) is SelfOutput


def test_summary():
    model = dropout_ext.convert(nn.Sequential(encoder(), SelfOutput(), Other()), fuse=True)
    states = {row.name: row.state for row in dropout_ext.dropout_summary(model)}
    assert (states["0"], states["1"], states["0.dropout1"]) == ("fused", "fused", "converted")
    assert "2" not in states
    assert all(
        row.reason == "" for row in dropout_ext.dropout_summary(model) if row.state == "fused"
    )


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["encoder", "SelfOutput"])
def test_wrapped(process_group, wrap, name):
    _, fused, inputs = pair(name)
    torch.manual_seed(5)
    expected = fused(*inputs)
    assert ours(lambda: fused(*inputs)) == CASES[name][2]
    wrapped = wrap(fused)
    torch.manual_seed(5)
    y = wrapped(*inputs)
    y.sum().backward()
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_a_sharded_norm_is_called(process_group):
    """As a unit of its own it has to gather its weights."""
    unfused, fused, inputs = pair("SelfOutput")
    for model in (unfused, fused):
        fully_shard(model.LayerNorm)
    torch.manual_seed(5)
    expected = unfused(*inputs)
    torch.manual_seed(5)
    assert_same_bits(fused(*inputs), expected)


@pytest.mark.parametrize(
    ("module", "kind"),
    [("bert", "Bert"), ("roberta", "Roberta"), ("electra", "Electra"), ("layoutlm", "LayoutLM")],
)
def test_bert_of_transformers(module, kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=H, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).double().train()
    unfused = dropout_ext.convert(copy.deepcopy(model))
    fused = dropout_ext.convert(model, fuse=True)
    rows = dropout_ext.dropout_summary(fused)
    assert [row.state for row in rows].count("fused") == 2 * 2
    ids = torch.arange(30).view(3, 10)
    results = []
    for m in (unfused, fused):
        torch.manual_seed(5)
        with dropout_ext.override():
            results.append(m(ids).last_hidden_state)
    assert torch.allclose(*results, rtol=1e-9, atol=1e-9)
    assert_same_bits(fused.eval()(ids)[0], unfused.eval()(ids)[0])
