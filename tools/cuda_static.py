"""What the compiled CUDA kernels cost, read from their machine code; no GPU is needed.

Compiles csrc/cuda/*.cu for every architecture, or takes a built extension, and demands of every
kernel: no stack and no local memory, so no spills; and of the flat kernels: 16-byte accesses alone
on the way of a whole tile. That way is the loop from a tile to the next, with the cheapest of the
activations. Norms have some of 16 bytes, for the rows that allow them, and their registers are
compared. Per eight elements its instructions, those of them for the ALU and its wide multiplies are
compared with csrc/cuda/static_counts.csv, and more of what limits fails: the ALU, which takes a
warp's instruction every other cycle; the wide multiplies; all instructions, where they are over
twice as many as the ALU's; registers, where fewer warps fit.

    python tools/cuda_static.py --check [--arch 90 ...] [--extension dropout_ext/_C.so]
    python tools/cuda_static.py --update
"""

from __future__ import annotations

import argparse
import csv
import heapq
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TABLE = ROOT / "csrc" / "cuda" / "static_counts.csv"
ARCHS = (75, 80, 86, 89, 90, 100, 120)
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Werror", "all-warnings"]  # as setup.py

# Mangled template arguments: dtype and bytes of an element.
DTYPES = {
    "d": ("float64", 8),
    "f": ("float32", 4),
    "NS0_7Float16E": ("float16", 2),
    "NS0_8BFloat16E": ("bfloat16", 2),
    "NS0_7ComplexIdEE": ("complex128", 16),
    "NS0_7ComplexIfEE": ("complex64", 8),
    "b": ("bool", 1),
}
# Functor of csrc/epilogue: its name, and how many tensors it reads.
EPILOGUES = {
    "Affine": ("dropout", 1),
    "Add": ("add", 2),
    "Activated": ("activation", 1),
    "ActivatedBackward": ("activation_backward", 2),
}
FLAT = re.compile(rf"flat_kernelI({'|'.join(DTYPES)})NS0_.*?\d({'|'.join(EPILOGUES)})E\w*Lb1EEE")
# Whether they begin at a multiple of their number in the element index.
BITS = re.compile(r"keep_bits_kernelILi16ELb([01])EEE")
# The sum has the dtype of the input where that is not given again.
NORM = re.compile(rf"(add_norm(?:_backward)?)_kernelI({'|'.join(DTYPES)})(\w*?)EEv")
COLUMNS = ("nvcc", "arch", "kernel", "dtype", "registers", "instructions", "alu", "wide_multiplies")
# Integer adds, logic, shifts, comparisons, selects, and packing two floats into 16 bits each.
ALU = re.compile(
    r"(V?IADD\w*|LOP\w*|PLOP3|SHF|LEA|PRMT|BMSK|SGXT|IABS|MOV|F?SEL|[FI]SETP|V?[FI]MNMX\w*|F2FP|P2R|R2P)"
    r"(\.|$)"
)


class StaticError(Exception):
    """A kernel that is not as it must be, or a tool that is missing."""


def find_tool(name: str) -> str | None:
    """From the environment's wheels, CUDA_HOME or PATH."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for path in (wheel, Path(home) / "bin" / name):
        if path.exists():
            return str(path)
    return shutil.which(name)


def missing_tools() -> list[str]:
    return [name for name in ("nvcc", "nvdisasm", "cuobjdump") if find_tool(name) is None]


def output_of(*command: str | Path) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise StaticError(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def nvcc_version() -> str:
    return re.search(r"release [\d.]+, V([\d.]+)", output_of(find_tool("nvcc"), "--version"))[1]


def check_resources(usage: str) -> dict[str, int]:
    """Registers of each kernel, by mangled name, from `cuobjdump -res-usage`; an error for any
    local memory, which is where registers are spilled to."""
    registers = {}
    name = None
    for line in usage.splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            if (match[2], match[3]) != ("0", "0"):
                raise StaticError(f"{name} uses local memory: {line.strip()}")
            registers[name] = int(match[1])
    return registers


def functions(sass: str) -> dict[str, list[str]]:
    """Labels and instructions of each kernel, from `nvdisasm -c`."""
    found: dict[str, list[str]] = {}
    body: list[str] | None = None
    for line in sass.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if match := re.match(r"\.text\.(\S+):", line):
            body = found.setdefault(match[1], [])
        elif line.startswith(".section"):
            body = None
        elif body is not None and (line.endswith(";") or re.match(r"\.L\S*:", line)):
            body.append(line)
    return found


@dataclass
class Block:
    instructions: list[str]
    successors: list[int]


def basic_blocks(body: list[str]) -> list[Block]:
    """The control flow of a kernel as one thread sees it: a reconvergence point is no branch."""
    blocks, labels = [Block([], [])], {}
    for line in body:
        if match := re.match(r"(\.L\S*):", line):
            if blocks[-1].instructions:
                blocks.append(Block([], []))
            labels[match[1]] = len(blocks) - 1
            continue
        blocks[-1].instructions.append(line)
        if re.search(r"\b(BRA|BRX|EXIT|RET|CALL)\b", line):
            blocks.append(Block([], []))
    for i, block in enumerate(blocks):
        if not block.instructions:
            block.successors = [i + 1] if i + 1 < len(blocks) else []
            continue
        last = block.instructions[-1]
        always = not re.match(r"@", last) and re.search(r"\b(BRA|EXIT|RET|CALL)\b", last)
        if always and re.search(r"BRA(\.U|\.DIV)?\S*\s+(!?UP\d|P\d|!P\d|~?UR)", last):
            always = None  # the condition is an operand
        if not always and i + 1 < len(blocks):
            block.successors.append(i + 1)
        target = re.search(r"`\((\.L\S*?)\)", last)
        if target and re.search(r"\b(BRA|CALL)\b", last):
            block.successors.append(labels[target[1]])
    return blocks


def whole_tile(body: list[str]) -> list[str]:
    """The instructions from one whole tile to the next: the shortest way around the loop through
    the block with the most 16-byte stores."""
    blocks = basic_blocks(body)

    # Cache modifiers stand before the width or after it. A predicate is of an end, but where no
    # store is without one.
    store = re.compile(r"STG\.\S*128\b")
    if not any(map(store.match, body)):
        store = re.compile(r"@\S+\s+STG\.\S*128\b")

    def stores(block: Block) -> int:
        return sum(map(bool, map(store.match, block.instructions)))

    most = max(map(stores, blocks))
    ways = []
    for start, block in enumerate(blocks):
        if most == 0 or stores(block) != most:
            continue
        queue = [(len(block.instructions), [start])]
        seen = set()
        while queue:
            cost, path = heapq.heappop(queue)
            for successor in blocks[path[-1]].successors:
                if successor == start:
                    ways.append((cost, path))
                elif successor not in seen:
                    seen.add(successor)
                    step = len(blocks[successor].instructions)
                    heapq.heappush(queue, (cost + step, [*path, successor]))
    if not ways:
        raise StaticError("no loop with 16-byte stores")
    return [line for i in min(ways)[1] for line in blocks[i].instructions]


def opcode(line: str) -> str:
    return re.sub(r"^@\S+\s+", "", line).split()[0]


def count_flat(name: str, body: list[str], element_size: int, inputs: int = 1) -> dict[str, float]:
    """Of each column that counts instructions its figure per eight elements; an error for narrow
    accesses."""
    codes = [opcode(line) for line in whole_tile(body)]
    accesses = {op: [code for code in codes if code.startswith(op)] for op in ("LDG", "STG")}
    stores = len(accesses["STG"])
    if any(".128" not in code for found in accesses.values() for code in found):
        raise StaticError(f"{name} has accesses of less than 16 bytes: {accesses}")
    if element_size > 1 and len(accesses["LDG"]) != inputs * stores:
        raise StaticError(f"{name} has {len(accesses['LDG'])} loads and {stores} stores")
    eights = stores * 16 / element_size / 8
    counts = {
        "instructions": len(codes),
        "alu": sum(bool(ALU.match(code)) for code in codes),
        "wide_multiplies": sum(bool(re.match(r"IMAD\.(WIDE|HI)", code)) for code in codes),
    }
    return {column: count / eights for column, count in counts.items()}


def check_wide(name: str, body: list[str]) -> None:
    """An error where no load or no store is of 16 bytes."""
    for op in ("LDG", "STG"):
        if not any(re.match(rf"{op}\.\S*128\b", opcode(line)) for line in body):
            raise StaticError(f"{name} has no {op} of 16 bytes")


def compile_cubin(arch: int, kernel: Path, folder: Path) -> Path:
    cubin = folder / f"{kernel.stem}.sm_{arch}.cubin"
    output_of(find_tool("nvcc"), *NVCC_FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", cubin, kernel)
    return cubin


def extract_cubins(extension: Path, folder: Path) -> list[tuple[int, Path]]:
    """The machine code in a built extension, with the architecture of each."""
    tool = find_tool("cuobjdump")
    subprocess.run([tool, "-xelf", "all", extension.resolve()], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return [
        (int(re.search(r"\.sm_(\d+)\.cubin$", path.name)[1]), path)
        for path in sorted(folder.glob("*.cubin"))
    ]


def measure(arch: int, cubin: Path) -> list[dict]:
    """One row per flat kernel and per norm; an error where any kernel is not as it must be."""
    registers = check_resources(output_of(find_tool("cuobjdump"), "-res-usage", cubin))
    bodies = functions(output_of(find_tool("nvdisasm"), "-c", cubin)) if registers else {}
    rows = []
    for name, body in bodies.items():
        local = [line for line in body if re.match(r"(LDL|STL)\b", opcode(line))]
        if local:
            raise StaticError(f"sm_{arch}: {name} uses local memory: {local[0]}")
        row = {"nvcc": nvcc_version(), "arch": f"sm_{arch}", "registers": str(registers[name])}
        if flat := FLAT.search(name):
            (dtype, size), (epilogue, inputs) = DTYPES[flat[1]], EPILOGUES[flat[2]]
            row |= {"kernel": epilogue, "dtype": dtype}
            counts = count_flat(f"sm_{arch}: {epilogue} of {dtype}", body, size, inputs)
            rows.append(row | {column: f"{count:.2f}" for column, count in counts.items()})
        elif bits := BITS.search(name):
            row |= {"kernel": "keep_bits", "dtype": ("misaligned", "aligned")[int(bits[1])]}
            counts = count_flat(f"sm_{arch}: {row['dtype']} keep_bits", body, 1 / 8)
            rows.append(row | {column: f"{count:.2f}" for column, count in counts.items()})
        elif norm := NORM.search(name):
            dtype, of_sum = DTYPES[norm[2]][0], DTYPES.get(norm[3], DTYPES[norm[2]])[0]
            check_wide(f"sm_{arch}: {norm[1]} of {dtype}", body)
            rows.append(row | {"kernel": norm[1], "dtype": f"{dtype}, {of_sum}"})
    return rows


def identity(row: dict) -> tuple[str, str, str]:
    return row["arch"], row["kernel"], row["dtype"]


def recorded() -> dict[tuple[str, str, str], dict]:
    with TABLE.open(newline="") as file:
        return {identity(row): row for row in csv.DictReader(file)}


def limits(row: dict) -> dict[str, float]:
    """What must not grow: cycles per eight elements, of a quarter of a multiprocessor for a warp
    (one instruction in each, one of the ALU in two), wide multiplies, and by registers the warps
    that do not fit (64 Ki registers, given to a thread by eights).
    """
    registers = int(row["registers"])
    found = {"warps that do not fit": 64 - min(64, 65536 // (32 * (registers + -registers % 8)))}
    if row.get("instructions"):
        instructions, alu = float(row["instructions"]), float(row["alu"])
        found["cycles"] = max(instructions, 2 * alu)
        found["wide multiplies"] = float(row["wide_multiplies"])
    return found


def compare(row: dict, before: dict | None) -> tuple[list[str], list[str]]:
    """What is worse than recorded, and what else is to be said."""
    what = " ".join(identity(row))
    is_16_bit = row["kernel"] == "dropout" and row["dtype"] in ("float16", "bfloat16")
    if is_16_bit and float(row["wide_multiplies"]) > 20:
        return [f"{what}: {row['wide_multiplies']} wide multiplies, more than one Philox call"], []
    if before is None:
        return [f"{what}: not in the table; run --update"], []
    if before["nvcc"] != row["nvcc"]:
        return [], [f"{what}: recorded with nvcc {before['nvcc']}, this is {row['nvcc']}"]
    now, then = limits(row), limits(before)
    worse = [f"{what}: {name} {now[name]:g}, recorded {then[name]:g}" for name in now
             if now[name] > then[name]]  # fmt: skip
    notes = [f"{what}: {column} {row[column]}, recorded {before[column]}; run --update"
             for column in COLUMNS[4:] if row.get(column, "") != before[column]]  # fmt: skip
    return worse, notes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the recorded table")
    what.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument("--extension", type=Path, metavar="_C.so",
                        help="read this build's kernels instead of compiling them")  # fmt: skip
    args = parser.parse_args()
    if missing := missing_tools():
        print(f"not found: {', '.join(missing)}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
            folder = Path(name)

            def compile_and_measure(arch, kernel):
                return measure(arch, compile_cubin(arch, kernel, folder))

            if args.extension:
                found = extract_cubins(args.extension, folder)
                units = [unit for unit in found if unit[0] in args.arch]
                if absent := set(args.arch) - {arch for arch, _ in units}:
                    raise StaticError(f"{args.extension} has no kernels for {sorted(absent)}")
                task = measure
            else:
                units = [(arch, kernel) for arch in args.arch for kernel in KERNELS]
                task = compile_and_measure
            rows = [row for rows in pool.map(task, *zip(*units, strict=True)) for row in rows]
    except StaticError as error:
        print(error, file=sys.stderr)
        return 1
    rows.sort(key=lambda row: (int(row["arch"].removeprefix("sm_")), *identity(row)[1:]))
    for row in rows:
        print("  ".join(f"{row.get(column, ''):>10}" for column in COLUMNS))
    if args.update:
        with TABLE.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return 0
    table = recorded()
    archs = {f"sm_{arch}" for arch in args.arch}
    gone = {key for key in table if key[0] in archs} - set(map(identity, rows))
    worse = [f"{' '.join(key)}: in the table, but not among the kernels" for key in sorted(gone)]
    for row in rows:
        more, notes = compare(row, table.get(identity(row)))
        worse += more
        print("\n".join(notes), end="\n" if notes else "")
    print("\n".join(worse), file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
