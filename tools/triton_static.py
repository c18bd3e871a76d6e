"""What dropout costs in compiled CUDA code, read from its machine code; no GPU is needed.

Has Inductor write the Triton code of a few patterns for the GPU below, without dropout, with
PyTorch's, with ours as an operator of its own and with ours in the loops around it; compiles the
kernels for every architecture, and counts per element of the pattern: their instructions, by the
units that they go to, those of our own kernels besides (from csrc/cuda/static_counts.csv), and the
bytes that all kernels pass to and from memory, as Inductor counts them. Of the configurations among
which a GPU would choose by time the one with the fewest instructions counts; kernels that see less
than half of the elements are left out. tools/triton_counts.csv has the figures: more instructions
or bytes of ours, fused, fail, and so does what misses a bar. Runs with the CPU build of torch and
Triton beside it.

    python -m tools.triton_static --check
    python -m tools.triton_static --update
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import math
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from tools import cuda_static
from tools.cuda_static import StaticError

TABLE = Path(__file__).with_name("triton_counts.csv")
ARCHS = (80, 90, 100)
P = 0.1
# An H100.
GPU = SimpleNamespace(
    name="",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)
UNITS = {
    "alu": cuda_static.ALU,
    "fma": re.compile(r"(IMAD|FFMA2?|FMUL2?|FADD2?|HFMA2|HMUL2|HADD2|DFMA|DMUL|DADD)(\.|$)"),
    "memory": re.compile(r"(LD|ST|LDG|STG|LDS|STS|LDSM|STSM|LDGSTS|ATOM\w*|RED|SHFL)(\.|$)"),
}
COLUMNS = (
    "torch", "triton", "pattern", "dropout", "arch", "pass",
    "instructions", *UNITS, "ours", "bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Pattern:
    """Of a layer's input, in bfloat16, with its residual and parameters."""

    function: str
    rows: int = 8192
    columns: int = 4096
    training: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def __str__(self) -> str:
        use = "training" if self.training else "inference"
        return f"{self.function} {self.rows}x{self.columns} {use}"


PATTERNS = (
    Pattern("layer_norm", training=True),
    Pattern("layer_norm", rows=32768, columns=1024, training=True),
    Pattern("layer_norm"),
    Pattern("layer_norm", rows=32768, columns=1024),
    Pattern("gelu"),
    Pattern("add"),
)
DROPOUTS = ("none", "F.dropout", "ours, opaque", "ours, fused")
# Of ours, fused, on sm_90: the most instructions and bytes.
BARS = {(str(PATTERNS[0]), "forward"): (90, 8.3)}


def function_of(pattern: Pattern, dropout: str):
    import torch
    import torch.nn.functional as F

    from dropout_ext import functional

    def drop(x, key):
        if dropout == "none":
            return x
        if dropout == "F.dropout":
            return torch.ops.aten.native_dropout(x, P, True)[0]  # what it is on CUDA
        return functional.dropout(x, P, key=key)

    def layer_norm(x, r, bias, weight, shift, key):
        return F.layer_norm(r + drop(x + bias, key), (x.shape[-1],), weight, shift)

    def gelu(x, r, bias, weight, shift, key):
        return drop(F.gelu(x + bias), key)

    def add(x, r, bias, weight, shift, key):
        return r + drop(x, key)

    return {"layer_norm": layer_norm, "gelu": gelu, "add": add}[pattern.function]


def says(value):
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def pretended_gpu():
    """As far as Inductor asks."""
    from unittest import mock

    import torch
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import inductor_prims  # noqa: F401

    class Driver:
        get_current_target = says(triton.backends.compiler.GPUTarget("cuda", 90, 32))
        get_active_torch_device = says(torch.device("cuda", 0))
        get_current_device = says(0)

    device = {"current_device": says(0), "get_device_properties": says(GPU)}
    answers = {
        torch.cuda: {
            **device,
            "is_available": says(True),
            "device_count": says(1),
            "get_device_capability": says((GPU.major, GPU.minor)),
            "_exchange_device": says(0),
            "_maybe_exchange_device": says(0),
            "get_rng_state": says(torch.zeros(16, dtype=torch.uint8)),
            "set_rng_state": says(None),
            "synchronize": says(None),
        },
        CudaInterface: {
            "get_device_properties": says(GPU),
            "is_triton_capable": says(True),
            "raise_if_triton_unavailable": says(None),
        },
        CudaInterface.Worker: device,
        # Its own indexes a tensor, which a build without CUDA refuses.
        torch.ops.prims.inductor_lookup_seed.default: {
            "prim_meta_impl": lambda seeds, index: seeds.new_empty(())
        },
    }
    with contextlib.ExitStack() as stack:
        for where, names in answers.items():
            for name, answer in names.items():
                stack.enter_context(mock.patch.object(where, name, answer))
        triton.runtime.driver.set_active(Driver())
        yield


def written_code(function, inputs: list, fused: str) -> list[tuple[str, float]]:
    """Of the forward pass, and where an input requires its gradient of the backward pass: what
    Inductor writes for CUDA of a function of CPU tensors, and the bytes that it counts. `fused`:
    see DROPOUT_EXT_INDUCTOR."""
    import torch
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.node import map_aggregate
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    found = []

    def instead_of_a_module(graph):
        code = graph.codegen()[0]
        found.append((getattr(code, "value", code), graph.count_bytes()[0]))
        return SimpleNamespace(__file__=None, key=None, call=None)

    def on_cuda(graph, inputs, **kwargs):
        """The graph was traced on the CPU, as autograd would ask for a GPU. So the two statistics
        that layer_norm saves of a row are bfloat16, not float32."""
        device = torch.device("cuda", 0)

        def moved(argument):
            return device if isinstance(argument, torch.device) else argument

        for node in graph.graph.nodes:
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)
            node.meta.pop("val", None)
        with FakeTensorMode() as mode:
            inputs = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
                for x in inputs
            ]
        context = torch._guards.TracingContext(mode)
        # How the forward pass lays out what it saves for the backward pass.
        context.output_strides = torch._guards.TracingContext.get().output_strides
        with pretended_gpu(), torch._guards.tracing(context):
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
            return compile_fx.compile_fx_inner(graph, inputs, **kwargs)

    os.environ["DROPOUT_EXT_INDUCTOR"] = fused
    GraphLowering.compile_to_module = instead_of_a_module
    with (
        config.patch(force_disable_caches=True, compile_threads=1),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        FakeTensorMode() as mode,
    ):
        inputs = [mode.from_tensor(x) for x in inputs]
        graph = make_fx(function)(*inputs)
        compile_fx.compile_fx(graph, inputs, inner_compile=on_cuda)
    return found


def kernels(code: str) -> dict[str, str]:
    """The sources of the Triton kernels, by name."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL))


def calls(code: str, operator: str) -> int:
    return len(re.findall(rf"= torch\.ops\.dropout_ext\.{operator}\.default\(", code))


def sizes(source: str) -> dict[str, int]:
    return {name: int(n) for name, n in re.findall(r"^ +(\w*numel) = (\d+)$", source, re.MULTILINE)}


def trips(source: str, constants: dict[str, int]) -> int:
    """How often each loop of a kernel goes round."""
    names = {**sizes(source), **constants, "split_size": constants.get("RSPLIT_SIZE")}
    found = set()
    for begin, end, step in re.findall(
        r"^ +for \w+ in (?:tl\.)?range\(([^,]+), ([^,]+), ([^,)]+)[^)]*\):", source, re.MULTILINE
    ):
        begin, end, step = (int(names.get(word, word)) for word in (begin, end, step))
        found.add(math.ceil((end - begin) / step))
    if len(found) > 1:
        raise StaticError(f"loops that go round {sorted(found)} times in\n{source}")
    return found.pop() if found else 1


def programs(source: str, constants: dict[str, int]) -> int:
    """How many thread blocks run."""
    n = 1
    for name, size in sizes(source).items():
        if name[0] in "xyz":
            block = constants.get("RSPLIT_SIZE") or constants[f"{name[0].upper()}BLOCK"]
            n *= math.ceil(size / block)
    return n


def executed(body: list[str], rounds: int) -> list[tuple[str, int]]:
    """Opcodes of a thread's way, each with how often it runs where every loop goes round as often:
    both sides of a branch, up to the last exit."""
    lines, labels = [], {}
    for line in body:
        if match := re.match(r"(\.L\S*):", line):
            labels[match[1]] = len(lines)
        else:
            lines.append(line)
    end = max(i for i, line in enumerate(lines) if cuda_static.opcode(line) == "EXIT") + 1
    times = [1] * end
    for i, line in enumerate(lines[:end]):
        target = re.search(r"\bBRA\b.*`\((\.L\S*?)\)", line)
        if target and labels[target[1]] <= i:
            first = labels[target[1]]
            if rounds == 1:
                raise StaticError("a loop that the source does not have")
            times[first : i + 1] = [rounds] * (i + 1 - first)
    return [(cuda_static.opcode(line), n) for line, n in zip(lines, times, strict=False)]


def by_unit(opcodes: list[tuple[str, int]]) -> dict[str, int]:
    counts = {"instructions": sum(n for _, n in opcodes)}
    for unit, pattern in UNITS.items():
        counts[unit] = sum(n for code, n in opcodes if pattern.match(code))
    return counts


def count_kernel(name: str, source: str, arch: int, elements: int, folder: Path) -> dict | None:
    """Instructions per element of the pattern; None where the kernel sees less than half."""
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if 2 * math.prod(sizes(source).values()) < elements:
        return None
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    triton_helpers.set_driver_to_gpu = says(None)
    with pretended_gpu():
        spec.loader.exec_module(module)
    kernel = getattr(module, name)
    least = None
    for config in kernel.configs:
        meta = kernel._create_compile_meta(config)
        unit = ASTSource(kernel.fn, meta["signature"], meta["constants"], meta["configs"][0])
        options = kernel._create_compile_options(config, meta)
        built = triton.compile(unit, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = folder / f"{name}.sm_{arch}.cubin"
        cubin.write_bytes(built.asm["cubin"])
        sass = cuda_static.output_of(cuda_static.find_tool("nvdisasm"), "-c", cubin)
        (body,) = cuda_static.functions(sass).values()
        constants = {**meta["constants"], **constexprs(source)}
        threads = programs(source, constants) * config.num_warps * 32
        counts = by_unit(executed(body, trips(source, constants)))
        counts = {unit: n * threads / elements for unit, n in counts.items()}
        if least is None or counts["instructions"] < least["instructions"]:
            least = counts
    return least


def constexprs(source: str) -> dict[str, int]:
    found = re.findall(r"^ +(\w+): tl\.constexpr = (\d+)$", source, re.MULTILINE)
    found += re.findall(r"'(RSPLIT_SIZE)': (\d+)", source)
    return {name: int(n) for name, n in found}


def of_our_kernels(code: str, arch: int) -> float:
    """Instructions per element."""
    table = cuda_static.recorded()
    return sum(
        calls(code, operator) * float(table[(f"sm_{arch}", *kernel)]["instructions"]) / 8
        for operator, kernel in {
            "apply": ("dropout", "bfloat16"),
            "keep_bits": ("keep_bits", "aligned"),
        }.items()
    )


def measure(pattern: Pattern, dropout: str) -> list[dict]:
    import torch
    import triton

    fused = "auto" if dropout == "ours, fused" else "never"
    shape = (pattern.rows, pattern.columns)
    inputs = [
        torch.empty(size, dtype=torch.bfloat16, requires_grad=pattern.training)
        for size in (shape, shape, *[pattern.columns] * 3)
    ]
    inputs.append(torch.empty(2, dtype=torch.int64))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = name
        codes = written_code(function_of(pattern, dropout), inputs, fused)
        for arch in ARCHS:
            for which, (code, n_bytes) in zip(("forward", "backward"), codes, strict=False):
                row = dict.fromkeys(("instructions", *UNITS), 0.0)
                for kernel, source in kernels(code).items():
                    counts = count_kernel(kernel, source, arch, pattern.elements, Path(name)) or {}
                    row = {unit: n + counts.get(unit, 0) for unit, n in row.items()}
                row |= {"ours": of_our_kernels(code, arch), "bytes": n_bytes / pattern.elements}
                rows.append(
                    {
                        "torch": torch.__version__.split("+")[0],
                        "triton": triton.__version__,
                        "pattern": str(pattern),
                        "dropout": dropout,
                        "arch": f"sm_{arch}",
                        "pass": which,
                        **{column: f"{n:.2f}" for column, n in row.items()},
                    }
                )
    return rows


def identity(row: dict) -> tuple[str, ...]:
    return row["pattern"], row["dropout"], row["arch"], row["pass"]


def recorded() -> dict[tuple[str, ...], dict]:
    with TABLE.open(newline="") as file:
        return {identity(row): row for row in csv.DictReader(file)}


def total(row: dict) -> float:
    return float(row["instructions"]) + float(row["ours"])


def missed(rows: list[dict]) -> list[str]:
    """Bars of ours, fused."""
    found = []
    for pattern, arch in dict.fromkeys((row["pattern"], row["arch"]) for row in rows):
        of = {
            dropout: [
                row
                for row in rows
                if (row["pattern"], row["arch"], row["dropout"]) == (pattern, arch, dropout)
            ]
            for dropout in ("ours, fused", "F.dropout")
        }
        ours, theirs = (sum(map(total, some)) for some in of.values())
        if ours >= theirs:
            found.append(f"{pattern}, {arch}: {ours:g} instructions, F.dropout {theirs:g}")
        for row in of["ours, fused"]:
            most = BARS.get((pattern, row["pass"])) if arch == "sm_90" else None
            if most and (total(row) > most[0] or float(row["bytes"]) > most[1]):
                found.append(
                    f"{pattern}, {row['pass']}, {arch}: {total(row):g} instructions and "
                    f"{row['bytes']} bytes, accepted are {most[0]} and {most[1]}"
                )
    return found


def compare(row: dict, before: dict | None) -> tuple[list[str], list[str]]:
    """What is worse than recorded, and what else is to be said."""
    what = " ".join(identity(row))
    if before is None:
        return [f"{what}: not in the table; run --update"], []
    versions = [
        f"{name} {before[name]}" for name in ("torch", "triton") if before[name] != row[name]
    ]
    if versions:
        return [], [f"{what}: recorded with {' and '.join(versions)}"]
    changed = {
        name: f"{what}: {name} {row[name]}, recorded {before[name]}"
        for name in COLUMNS[6:]
        if row[name] != before[name]
    }
    worse = [
        text
        for name, text in changed.items()
        if row["dropout"] == "ours, fused"
        and name in ("instructions", "ours", "bytes")
        and float(row[name]) > float(before[name])
    ]
    return worse, [f"{text}; run --update" for text in changed.values() if text not in worse]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the recorded table")
    what.add_argument("--update", action="store_true", help="write the table")
    args = parser.parse_args()
    found = {
        "nvdisasm": cuda_static.find_tool("nvdisasm"),
        "triton": importlib.util.find_spec("triton"),
    }
    if missing := [name for name, what in found.items() if what is None]:
        print(f"not found: {', '.join(missing)}", file=sys.stderr)
        return 2
    jobs = [(pattern, dropout) for pattern in PATTERNS for dropout in DROPOUTS]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        try:
            rows = [row for rows in pool.map(measure, *zip(*jobs, strict=True)) for row in rows]
        except StaticError as error:
            print(error, file=sys.stderr)
            return 1
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS[2:]}
    for row in ({name: name for name in COLUMNS}, *rows):
        print("  ".join(f"{row[name]:{width}}" for name, width in widths.items()))
    worse = missed(rows)
    if args.update:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = recorded()
        for row in rows:
            found, notes = compare(row, table.get(identity(row)))
            worse += found
            for note in notes:
                print(f"note: {note}")
    for text in worse:
        print(text, file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
