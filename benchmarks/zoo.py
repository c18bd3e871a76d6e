"""Models with dropout, initialised at random: trained by tests/test_models.py, timed by models.py.

Each has dropout of torch.nn, or of plain PyTorch where torch.nn has none; `ours` is the same model
with dropout_ext's. Logits are in the last dimension.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sizes(NamedTuple):
    batch: int
    length: int  # of a sequence
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    channels: int
    image: int  # height and width


SMALL = Sizes(
    batch=16, length=12, vocabulary=40, hidden=32, layers=2, heads=2, channels=16, image=8
)
MEDIUM = Sizes(
    batch=4, length=128, vocabulary=1000, hidden=256, layers=4, heads=4, channels=64, image=32
)


class Encoder(nn.Module):
    def __init__(self, p: float, sizes: Sizes):
        super().__init__()
        hidden = sizes.hidden
        self.tokens = nn.Embedding(sizes.vocabulary, hidden)
        layer = nn.TransformerEncoderLayer(
            hidden, sizes.heads, 2 * hidden, dropout=p, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden, sizes.vocabulary)

    def forward(self, ids):
        return self.head(self.encoder(self.tokens(ids)))


class LockedLstm(nn.Module):
    """A language model: one mask for all time steps, of the LSTM's input and of its output."""

    def __init__(self, p: float, sizes: Sizes):
        super().__init__()
        hidden = sizes.hidden
        self.tokens = nn.Embedding(sizes.vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.drops = nn.ModuleList(nn.Dropout1d(p) for _ in range(2))
        self.head = nn.Linear(hidden, sizes.vocabulary)

    def forward(self, ids):
        x = self._drop(0, self.tokens(ids))
        return self.head(self._drop(1, self.lstm(x)[0]))

    def _drop(self, n, x):
        drop = self.drops[n]
        if not isinstance(drop, nn.Dropout1d):
            return drop(x)
        # Dropout1d of (N, C, T) is what LockedDropout is of (N, T, C).
        return drop(x.transpose(1, 2)).transpose(1, 2)


class StochasticDepth(nn.Module):
    """DropPath of plain PyTorch."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1)) >= self.p
        return torch.where(keep, x / (1 - self.p), 0)


class ConvNet(nn.Module):
    """Residual blocks under DropPath, whole channels dropped after each."""

    def __init__(self, p: float, sizes: Sizes):
        super().__init__()
        channels = sizes.channels
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
            )
            for _ in range(sizes.layers)
        )
        self.paths = nn.ModuleList(StochasticDepth(p) for _ in range(sizes.layers))
        self.drops = nn.ModuleList(nn.Dropout2d(p) for _ in range(sizes.layers))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images):
        x = self.stem(images).relu()
        for block, path, drop in zip(self.blocks, self.paths, self.drops, strict=True):
            x = drop(x + path(block(x)))
        return self.head(x.mean((2, 3)))


class Lora(nn.Module):
    """A frozen linear layer with a trained update of low rank, its input dropped."""

    def __init__(self, base: nn.Linear, p: float, rank: int = 8):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.drop = nn.Dropout(p)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.drop(x)))


class LoraStack(nn.Module):
    def __init__(self, p: float, sizes: Sizes):
        super().__init__()
        hidden = sizes.hidden
        self.tokens = nn.Embedding(sizes.vocabulary, hidden)
        self.layers = nn.ModuleList(Lora(nn.Linear(hidden, hidden), p) for _ in range(sizes.layers))
        self.head = nn.Linear(hidden, sizes.vocabulary)

    def forward(self, ids):
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


class Logits(nn.Module):
    """A model of Hugging Face's, as a function of ids or of images."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs).logits


def bert(p: float, sizes: Sizes, attention: str = "sdpa") -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.hidden,
        max_position_embeddings=sizes.length,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    )
    config._attn_implementation = attention
    return Logits(transformers.BertForMaskedLM(config))


def gpt2(p: float, sizes: Sizes, attention: str = "sdpa") -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.length,
        n_embd=sizes.hidden,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = attention
    return Logits(transformers.GPT2LMHeadModel(config))


def vit(p: float, sizes: Sizes) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        image_size=sizes.image,
        # As many patches as a sequence has tokens, about.
        patch_size=(2, 4),
        num_channels=1,
        num_labels=CLASSES,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.hidden,
        hidden_dropout_prob=p,
        attention_probs_dropout_prob=p,
    )
    config._attn_implementation = "sdpa"
    return Logits(transformers.ViTForImageClassification(config))


CLASSES = 10  # of images


def tokens(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """Ids, and the labels: each token's successor in a fixed permutation."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length), generator=generator)
    order = torch.randperm(sizes.vocabulary, generator=torch.Generator().manual_seed(0))
    return ids, order[ids]


def images(sizes: Sizes, step: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of one picture per class: plane waves of different directions and lengths."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (sizes.batch,), generator=generator)
    at = torch.arange(sizes.image, dtype=torch.float32)
    k = torch.arange(CLASSES)
    phase = (k % 5 + 1)[:, None, None] * at[:, None] + (k // 5 * 2)[:, None, None] * at
    waves = torch.sin(2 * torch.pi * phase / 8)
    noise = torch.randn(sizes.batch, sizes.image, sizes.image, generator=generator)
    return (waves[labels] + 0.3 * noise).unsqueeze(1), labels


class Model(NamedTuple):
    build: Callable[[float, Sizes], nn.Module]
    batch: Callable[[Sizes, int], tuple[Tensor, Tensor]] = tokens


MODELS = {
    "nn.TransformerEncoder": Model(Encoder),
    "BERT, sdpa": Model(bert),
    "BERT, eager": Model(lambda p, sizes: bert(p, sizes, "eager")),
    "GPT-2, sdpa": Model(gpt2),
    "GPT-2, eager": Model(lambda p, sizes: gpt2(p, sizes, "eager")),
    "ViT, sdpa": Model(vit, images),
    "LSTM, locked": Model(LockedLstm),
    "convolutions": Model(ConvNet, images),
    "LoRA": Model(LoraStack),
}


def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2).float(), labels.flatten())


def ours(model: nn.Module, fuse: bool = False) -> nn.Module:
    """A converted copy, with our modules for those that torch.nn has no counterpart of."""
    import dropout_ext

    model = dropout_ext.convert(copy.deepcopy(model), fuse=fuse)
    for module in list(model.modules()):
        if isinstance(module, LockedLstm):
            module.drops = nn.ModuleList(dropout_ext.LockedDropout(drop.p) for drop in module.drops)
        if isinstance(module, ConvNet):
            module.paths = nn.ModuleList(dropout_ext.DropPath(path.p) for path in module.paths)
    return model
