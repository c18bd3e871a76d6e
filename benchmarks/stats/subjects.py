"""What the battery looks at: the product, nn.Dropout, and copies of the contract that were broken
on purpose. All answer the same questions; None says that a question makes no sense there.

A key is a pair (seed, offset). nn.Dropout has no offset: it is seeded with seed + offset.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import dropout_ext
from benchmarks.record import ROOT
from benchmarks.stats import bits

CHUNK = 2**20
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex128,
    torch.complex64,
)


def _square(n):
    """Two factors of n, a power of two, near its root."""
    a = 1 << (n.bit_length() - 1) // 2
    return a, n // a


def _channels_last(n):
    return torch.empty(n // 1024, 16, 8, 8).to(memory_format=torch.channels_last)


# An empty tensor of n elements each, n a power of two from 1024.
LAYOUTS = {
    "contiguous": lambda n: torch.empty(n),
    "misaligned": lambda n: torch.empty(n + 3)[3:],
    "channels_last": _channels_last,
    "transposed": lambda n: torch.empty(_square(n)).t(),
    "every second": lambda n: torch.empty(2 * n)[::2],
    "part of rows": lambda n: torch.empty(n // 32, 40)[:, 3:35],
    "expanded": lambda n: torch.empty(n // 32, 1).expand(n // 32, 32),
}


def make(layout, n, dtype, value=None, generator=None):
    """A tensor of this layout that is `value`, or 1 + N(0, 1) without zeros."""
    x = LAYOUTS[layout](n)
    if value is not None:
        filled = torch.full((), value).expand_as(x)
    else:
        shape = [
            1 if stride == 0 else size for size, stride in zip(x.shape, x.stride(), strict=True)
        ]
        filled = 1 + torch.randn(shape, generator=generator)
        filled = torch.where(filled.abs() < 1e-3, 1e-3, filled).expand_as(x)
    if layout == "expanded":
        return filled[:, :1].to(dtype).expand_as(x)
    if layout == "channels_last":
        return filled.to(dtype).contiguous(memory_format=torch.channels_last)
    return (
        torch.empty_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), dtype=dtype)
        .as_strided(x.shape, x.stride(), x.storage_offset())
        .copy_(filled)
    )


def drops(y) -> int:
    """Zeros of y, which was made of ones."""
    if y.is_complex():
        y = torch.view_as_real(y)[..., 0]
    if y.element_size() in (2, 4, 8):
        y = y.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()])
    return y.numel() - int(torch.count_nonzero(y))


class Product:
    """dropout_ext as users call it."""

    name = "dropout_ext"
    layouts = tuple(LAYOUTS)
    dtypes = DTYPES

    def bits(self, key, p, n):
        """The first n elements of the mask, packed; n is a multiple of 64."""
        key, out = dropout_ext.key(*key), np.empty(n // 8, np.uint8)
        for at in range(0, n, CHUNK):
            size = min(CHUNK, n - at)
            kept = dropout_ext.keep_mask((size,), p, key, mask_strides=(1,), mask_offset=at)
            out[at // 8 : (at + size) // 8] = bits.pack(~kept)
        return out

    def apply(self, x, p, key, first=0):
        """The output for x, which lies at element `first` of a longer flat tensor."""
        if first:
            return dropout_ext.dropout(
                x, p, key=dropout_ext.key(*key), mask_strides=x.stride(), mask_offset=first
            )
        return dropout_ext.dropout(x, p, key=dropout_ext.key(*key))

    def calls(self, p, n, count, seed, dtype=torch.float32):
        """The masks of consecutive calls of one module."""
        module, x = dropout_ext.Dropout(p), torch.ones(n, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [bits.pack(module(x) == 0) for _ in range(count)]

    def call(self, p, n):
        return bits.pack(dropout_ext.dropout(torch.ones(n), p) == 0)

    def rank_key(self, key, step, rank):
        folded = dropout_ext.fold_in(dropout_ext.fold_in(dropout_ext.key(*key), step), rank)
        return tuple(folded.tolist())

    def family(self, p, key, n):
        """(drops, decisions) of what has a path or an index map of its own."""
        k, f = dropout_ext.key(*key), dropout_ext.functional
        rows, wide = torch.ones(n // 32, 32), torch.ones(n // 4, 4)
        images = wide.view(n // 64, 16, 2, 2)
        yield "in place", drops(dropout_ext.dropout(rows.clone(), p, inplace=True, key=k)), n
        shard = dropout_ext.dropout(rows, p, key=k, mask_strides=(128, 1), mask_offset=2**34 + 32)
        yield "shard", drops(shard), n
        shared = dropout_ext.dropout(wide, p, key=k, broadcast_dims=(1,))
        yield "broadcast_dims", drops(shared[:, 0].contiguous()), n // 4
        yield "dropout2d", drops(f.dropout2d(images, p, key=k)[..., 0, 0].contiguous()), n // 4
        locked = f.locked_dropout(wide.view(n // 64, 4, 16), p, dim=1, key=k)
        yield "locked_dropout", drops(locked[:, 0].contiguous()), n // 4
        yield "drop_path", drops(f.drop_path(wide, p, True, key=k)[:, 0].contiguous()), n // 4
        per_slice = dropout_ext.dropout(wide.view(16, -1), p, key=dropout_ext.split(k, 16))
        yield "key per slice", drops(per_slice), n


class TorchDropout:
    """nn.Dropout on the CPU, as its users call it."""

    name = "nn.Dropout"
    layouts = tuple(LAYOUTS)
    dtypes = DTYPES[:4]  # it has no complex ones on the CPU

    def bits(self, key, p, n):
        out = np.empty(n // 8, np.uint8)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(key) % 2**64)
            x = torch.ones(min(n, CHUNK))
            for at in range(0, n, CHUNK):
                size = min(CHUNK, n - at)
                out[at // 8 : (at + size) // 8] = bits.pack(F.dropout(x[:size], p) == 0)
        return out

    def apply(self, x, p, key, first=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((sum(key) + first) % 2**64)
            return F.dropout(x, p)

    def calls(self, p, n, count, seed, dtype=torch.float32):
        module, x = torch.nn.Dropout(p), torch.ones(n, dtype=dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [bits.pack(module(x) == 0) for _ in range(count)]

    def call(self, p, n):
        return bits.pack(F.dropout(torch.ones(n), p) == 0)

    def rank_key(self, key, step, rank):
        """What training scripts do: one seed per rank, and here per step."""
        return key[0] + 1000 * step + rank, 0

    def family(self, p, key, n):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(key))
            yield "in place", drops(F.dropout(torch.ones(n), p, inplace=True)), n
            images = torch.ones(n // 64, 16, 2, 2)
            yield "dropout2d", drops(F.dropout2d(images, p)[..., 0, 0].contiguous()), n // 4


_KEY, _INDEX = ctypes.c_void_p, ctypes.c_uint64
_SIGNATURES = {
    "words": (_KEY, _INDEX, _INDEX, ctypes.c_void_p),
    "upper_halves": (_KEY, _INDEX, _INDEX, ctypes.c_void_p),
    "dropped": (_KEY, _INDEX, _INDEX, ctypes.c_double, ctypes.c_void_p),
    "derive": (_KEY, ctypes.c_uint64, ctypes.c_void_p),
}


def _pointer(array):
    return array.ctypes.data


class Contract:
    """csrc/contract/mask.h, compiled by the host compiler, after replacing `patches` in it."""

    layouts = ("contiguous",)
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, name="csrc/contract/mask.h", patches=()):
        self.name = name
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            for header in ("mask.h", "philox.h"):
                text = (ROOT / "csrc" / "contract" / header).read_text()
                for file, old, new in patches:
                    if file == header:
                        if text.count(old) != 1:
                            raise ValueError(f"{file} does not contain {old!r} once")
                        text = text.replace(old, new)
                (folder / header).write_text(text)
            source = Path(__file__).parent / "native" / "stream.cpp"
            library = folder / "stream.so"
            compiler = os.environ.get("CXX", "c++")
            flags = ["-std=c++20", "-O3", "-shared", "-fPIC", f"-I{folder}"]
            subprocess.run([compiler, *flags, source, "-o", library], check=True)
            self._library = ctypes.CDLL(str(library))
        for function, arguments in _SIGNATURES.items():
            getattr(self._library, function).argtypes = arguments

    def _call(self, function, key, *arguments):
        key = np.array(key, np.uint64)
        getattr(self._library, function)(_pointer(key), *arguments)

    def words(self, key, n, first=0):
        """uint32 words in element order."""
        out = np.empty(n, np.uint32)
        self._call("words", key, first, n, _pointer(out))
        return out

    def upper_halves(self, key, n, first=0):
        out = np.empty(n, np.uint16)
        self._call("upper_halves", key, first, n, _pointer(out))
        return out

    def bits(self, key, p, n, first=0):
        out = np.empty(n // 8, np.uint8)
        self._call("dropped", key, first, n, p, _pointer(out))
        return out

    def apply(self, x, p, key, first=0):
        dropped = torch.from_numpy(bits.unpack(self.bits(key, p, x.numel(), first), x.numel()))
        scaled = (x.float() * torch.tensor(1 / (1 - p))).to(x.dtype)
        return scaled.masked_fill(dropped.view(x.shape).bool(), 0)

    def calls(self, p, n, count, seed, dtype=torch.float32):
        """As on a GPU: the offset counts the calls."""
        return [self.bits((seed, call), p, n) for call in range(count)]

    call = None

    def rank_key(self, key, step, rank):
        for n in (step, rank):
            derived = np.empty(2, np.uint64)
            self._call("derive", key, n, _pointer(derived))
            key = tuple(derived.tolist())
        return key

    family = None


_LANE = "return lane < 4 ? w : (w << 16 | w >> 16);"
_WORD = "return lane_word(block_words(key, index >> 3), static_cast<int>(index & 7));"

# name: (patches of csrc, the tests that have to catch it)
MUTATIONS = {
    "2 Philox rounds": (
        [("philox.h", "kPhiloxRounds = 10", "kPhiloxRounds = 2")],
        {"lags 1 to 64", "patterns of a block", "runs of dropped elements", "lag 2^k"},
    ),
    # Not required of any test: what few rounds more take to hide.
    "6 Philox rounds": ([("philox.h", "kPhiloxRounds = 10", "kPhiloxRounds = 6")], set()),
    "lane repeated": (
        [("mask.h", _LANE, "return w;")],
        {"lags 1 to 64", "patterns of a block", "pairs of lanes"},
    ),
    "offset advances by half": (
        # What PyTorch's CUDA kernel is suspected of: eight elements take two Philox calls, and the
        # next call of the module starts at the second of them.
        [
            (
                "mask.h",
                _WORD,
                "const Key now{key.seed, key.offset + (index >> 2 & 1)};\n"
                "  return block_words(now, index >> 3).w[index & 3];",
            )
        ],
        {"consecutive calls", "key offset + 1"},
    ),
    "p in steps of 1/256": (
        # TransformerEngine's threshold.
        [
            (
                "mask.h",
                "return static_cast<uint64_t>(p * 4294967296.0 + 0.5);",
                "return static_cast<uint64_t>(p * 256.0) << 24;",
            )
        ],
        {"drop rate", "drop rate by lane", "sum of the output"},
    ),
    "ranks in pairs": (
        [("mask.h", "key.offset + n;", "key.offset + (n >> 1);")],
        {"ranks, all pairs"},
    ),
}
