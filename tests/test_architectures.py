"""Architectures of transformers, tiny and initialised at random: a step of each under
convert(fuse=True) and override, without a draw of PyTorch's.
"""

import copy
from collections import Counter

import pytest
import torch
from helpers import assert_same_bits
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import dropout_ext

transformers = pytest.importorskip("transformers")

P = 0.3
H = 16  # hidden size
IDS = torch.arange(30).view(3, 10)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
TEXT = {
    "vocab_size": 50, "hidden_size": H, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "hidden_dropout_prob": P, "attention_probs_dropout_prob": P,
}  # fmt: skip
BART = {
    "vocab_size": 50, "d_model": H, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "dropout": P, "attention_dropout": P, "activation_dropout": P,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 50, "d_model": H, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "dropout_rate": P, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
IMAGE = {
    "hidden_size": H, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "hidden_dropout_prob": P, "attention_probs_dropout_prob": P, "image_size": 32, "patch_size": 8,
}  # fmt: skip
ids = {"input_ids": IDS}
pair = {"input_ids": IDS, "decoder_input_ids": IDS}
pixels = {"pixel_values": PIXELS}

# The class before "Config" and "Model", its configuration, its inputs, and the fused operators.
ARCHITECTURES = {
    "Bert": (TEXT, ids, {"add_norm"}),
    "Roberta": (TEXT, ids, {"add_norm"}),
    "Electra": (TEXT, ids, {"add_norm"}),
    "DebertaV2": (TEXT | {"relative_attention": True}, ids, {"add_norm"}),
    "DistilBert": (
        {
            "vocab_size": 50, "dim": H, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": P,
            "attention_dropout": P,
        },
        ids,
        set(),
    ),
    "GPT2": (
        {
            "vocab_size": 50, "n_embd": H, "n_layer": 2, "n_head": 2, "resid_pdrop": P,
            "embd_pdrop": P, "attn_pdrop": P, "bos_token_id": 0, "eos_token_id": 0,
        },
        ids,
        set(),
    ),
    "OPT": (
        {
            "vocab_size": 50, "hidden_size": H, "ffn_dim": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "dropout": P, "attention_dropout": P,
            "word_embed_proj_dim": H, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        ids,
        {"add"},
    ),
    "Bart": (BART, pair, {"add_norm", "activation"}),
    "MBart": (BART, pair, {"add", "add_norm", "activation"}),
    "Pegasus": (BART, pair, {"add", "add_norm", "activation"}),
    "Marian": (BART, pair, {"add_norm", "activation"}),
    "Whisper": (
        BART | {"num_mel_bins": 8, "max_source_positions": 10, "suppress_tokens": None},
        {
            "input_features": torch.linspace(-1, 1, 3 * 8 * 20).view(3, 8, 20),
            "decoder_input_ids": IDS,
        },
        {"add", "activation"},  # no norms: the encoder's states are transposed in memory
    ),
    "T5": (T5, pair, {"add", "activation"}),
    "MT5": (T5 | {"feed_forward_proj": "gated-gelu"}, pair, {"add"}),
    "ViT": (IMAGE, pixels, {"add", "add_norm"}),
    "DeiT": (IMAGE, pixels, {"add", "add_norm"}),
    "Beit": (IMAGE | {"drop_path_rate": P}, pixels, {"add", "add_norm"}),
    "Swin": (
        {
            "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2],
            "num_heads": [2, 2], "window_size": 4, "drop_path_rate": P, "hidden_dropout_prob": P,
            "attention_probs_dropout_prob": P,
        },
        pixels,
        {"add", "add_norm"},
    ),
    "ConvNext": (
        {"depths": [2, 2], "hidden_sizes": [8, 16], "num_stages": 2, "drop_path_rate": P},
        pixels,
        {"add"},
    ),
    "Wav2Vec2": (
        {
            "hidden_size": H, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "conv_dim": [8, 8], "conv_stride": [5, 2],
            "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2, "hidden_dropout": P, "attention_dropout": P,
            "activation_dropout": P, "feat_proj_dropout": P, "layerdrop": 0.0,
            "mask_time_prob": 0.0, "vocab_size": 50,
        },
        {"input_values": torch.linspace(-1, 1, 2 * 400).view(2, 400)},
        {"add_norm", "activation"},
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", ARCHITECTURES)


class Draws(TorchDispatchMode):
    """How often an operator of PyTorch's that may drop runs, and which of ours do."""

    def __init__(self):
        super().__init__()
        self.theirs, self.ours = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("dropout_ext::"):
            self.ours.add(name.split("::")[1].split(".")[0])
        # Keys are drawn outside of dispatch modes.
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.theirs[name] += 1
        return func(*args, **(kwargs or {}))


def build(name):
    config, inputs, fused = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**config)
    return getattr(transformers, f"{name}Model")(config).train(), inputs, fused


def output(model, inputs):
    return model(**inputs)[0]


def left(model):
    """Names of the modules whose dropout stays PyTorch's."""
    rows = dropout_ext.dropout_summary(model)
    return [row.name for row in rows if row.state in ("left", "to convert")]


@each
def test_trains_without_a_draw_of_pytorch(name):
    model, inputs, fused = build(name)
    model = dropout_ext.convert(model, fuse=True)
    assert not left(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with dropout_ext.override(), Draws() as draws:
        loss = output(model, inputs).square().mean()
        loss.backward()
    optimizer.step()
    assert not draws.theirs
    assert draws.ours & {"add", "add_norm", "activation"} == fused
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@each
def test_computes_what_it_did(name):
    """In float64 nothing but another mask makes a difference as large as 1e-7."""
    model, inputs, _ = build(name)
    model = model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = output(copy.deepcopy(model).eval(), inputs)
    unfused = dropout_ext.convert(copy.deepcopy(model))
    fused = dropout_ext.convert(model, fuse=True)
    results = []
    for each in (unfused, fused):
        torch.manual_seed(5)
        with dropout_ext.override():
            y = output(each, inputs)
            y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in each.parameters() if p.grad is not None)])
        assert_same_bits(output(each.eval(), inputs), expected)
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-7)


def test_draws_are_counted():
    """Those of functions, modules, attention and layers that are skipped by chance."""
    model, inputs, _ = build("Beit")
    with Draws() as draws:
        output(model, inputs)
    assert draws.theirs
    config, inputs, _ = ARCHITECTURES["Wav2Vec2"]
    config = transformers.Wav2Vec2Config(**config | {"layerdrop": P})
    model = dropout_ext.convert(transformers.Wav2Vec2Model(config).train(), fuse=True)
    assert left(model) == ["encoder"]
    with dropout_ext.override(), Draws() as draws:
        output(model, inputs)
    assert draws.theirs == {"aten::rand": config.num_hidden_layers}


def gradients(model, inputs):
    torch.manual_seed(5)
    model.zero_grad()
    with dropout_ext.override():
        output(model, inputs).square().mean().backward()
    # A pooler takes no part; compiled, its gradient is zero.
    return [p.grad for n, p in model.named_parameters() if "pooler" not in n and p.grad is not None]


@pytest.mark.parametrize("name", ["Bert", "Bart", "T5", "ViT", "Swin"])
def test_gradient_checkpointing(name):
    """Layers are run again, which their forward decides by being the class's own."""
    model, inputs, _ = build(name)
    model = dropout_ext.convert(model, fuse=True)
    calls = Counter()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, *_: calls.update([module]))
    expected = gradients(model, inputs)
    once = calls.copy()
    calls.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(model, inputs), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert any(calls[module] == 2 * n for module, n in once.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "Bart", "T5", "ViT"])
def test_compiled(name):
    torch.compiler.reset()
    model, inputs, _ = build(name)
    model = dropout_ext.convert(model, fuse=True)
    expected = gradients(model, inputs)
    model.compile(backend="aot_eager")
    for a, b in zip(gradients(model, inputs), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def layers(model):
    return [m for m in model.modules() if type(m).__name__.endswith(("EncoderLayer", "ViTLayer"))]


@pytest.mark.parametrize("name", ["Bart", "ViT"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_sharded(process_group, name, order):
    """Layers that are units of FSDP2, converted before that or after."""
    model, inputs, fused = build(name)
    expected = gradients(dropout_ext.convert(copy.deepcopy(model), fuse=True), inputs)
    if order == "before":
        dropout_ext.convert(model, fuse=True)
    for layer in layers(model):
        fully_shard(layer)
    fully_shard(model)
    if order == "after":
        dropout_ext.convert(model, fuse=True)
    with Draws() as draws:
        actual = gradients(model, inputs)
    assert draws.ours >= fused
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a.full_tensor(), b, rtol=1e-4, atol=1e-6)


def test_saved_and_loaded(tmp_path):
    model, inputs, fused = build("Bart")
    state = copy.deepcopy(model.state_dict())
    model = dropout_ext.convert(model, fuse=True)
    assert model.state_dict().keys() == state.keys()
    expected = gradients(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with Draws() as draws:
        actual = gradients(again, inputs)
    assert draws.ours >= fused
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b)
    model.save_pretrained(tmp_path / "pretrained")
    plain = type(model).from_pretrained(tmp_path / "pretrained")
    for name, value in plain.state_dict().items():
        assert_same_bits(value, state[name])
    kinds = [type(module) for module in dropout_ext.revert(model).modules()]
    assert kinds == [type(module) for module in plain.modules()]


@pytest.mark.parametrize("name", ["Bert", "Bart", "ViT"])
def test_what_is_recorded_on_the_way(name):
    model, inputs, _ = build(name)
    model.set_attn_implementation("eager")
    unfused = dropout_ext.convert(copy.deepcopy(model))
    fused = dropout_ext.convert(model, fuse=True)
    results = []
    for each in (unfused, fused):
        torch.manual_seed(5)
        with dropout_ext.override():
            recorded = each(**inputs, output_hidden_states=True, output_attentions=True)
        results.append([*recorded.values()])
    for a, b in zip(*results, strict=True):
        a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
        for one, other in zip(a, b, strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
