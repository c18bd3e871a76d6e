"""tools/cuda_static.py: what the machine code of the CUDA kernels must be, and what it notices."""

import sys

import pytest
from fused_reference import PAIRS
from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import cuda_static
from cuda_static import StaticError

sys.path.pop(0)

needs_tools = pytest.mark.skipif(
    bool(cuda_static.missing_tools()), reason=f"not found: {', '.join(cuda_static.missing_tools())}"
)


def test_the_table_is_complete():
    kernels = {
        "dropout": [dtype for dtype, _ in cuda_static.DTYPES.values()],
        "keep_bits": ["aligned", "misaligned"],
        "add": ["float64", "float32", "float16", "bfloat16"],
        "activation": ["float32", "float16", "bfloat16"],
        "activation_backward": ["float32", "float16", "bfloat16"],
        "add_norm": [", ".join(str(dtype)[6:] for dtype in pair) for pair in PAIRS],
        "add_norm_backward": [", ".join(str(dtype)[6:] for dtype in pair) for pair in PAIRS],
    }
    rows = {
        (f"sm_{arch}", kernel, dtype)
        for arch in cuda_static.ARCHS
        for kernel, dtypes in kernels.items()
        for dtype in dtypes
    }
    assert set(cuda_static.recorded()) == rows


# `make cuda-static` does the same for every architecture.
@needs_tools
@pytest.mark.parametrize(("name", "n"), [("apply", len(cuda_static.DTYPES)), ("keep_bits", 2)])
def test_kernels_of_one_architecture(name, n, tmp_path):
    table = cuda_static.recorded()
    (source,) = (kernel for kernel in cuda_static.KERNELS if kernel.stem == name)
    rows = cuda_static.measure(90, cuda_static.compile_cubin(90, source, tmp_path))
    assert len(rows) == n
    for row in rows:
        worse, _ = cuda_static.compare(row, table[cuda_static.identity(row)])
        assert not worse


@needs_tools
def test_local_memory_is_noticed(tmp_path):
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void f(int* x) { int a[64]; for (int i = 0; i < 64; ++i) a[x[i] & 63] = i;"
        " x[0] = a[x[1] & 63]; }\n"
    )
    with pytest.raises(StaticError, match="local memory"):
        cuda_static.measure(80, cuda_static.compile_cubin(80, source, tmp_path))


def test_spills_are_noticed():
    usage = " Function f:\n  REG:80 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0\n"
    with pytest.raises(StaticError, match="local memory"):
        cuda_static.check_resources(usage)
    assert cuda_static.check_resources(usage.replace("STACK:8", "STACK:0")) == {"f": 80}


@needs_tools
def test_kernels_of_a_built_extension(tmp_path):
    source, built = tmp_path / "local.cu", tmp_path / "_C.so"
    source.write_text("__global__ void f(int* x) { x[0] = 1; }\n")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    cuda_static.output_of(
        cuda_static.find_tool("nvcc"), *codes, "-shared", "-Xcompiler", "-fPIC", "-o", built, source
    )
    cubins = cuda_static.extract_cubins(built, tmp_path)
    assert {arch for arch, _ in cubins} == {80, 90}
    for arch, cubin in cubins:
        assert cuda_static.measure(arch, cubin) == []  # neither flat kernels nor norms


# A loop over tiles with a whole and a guarded way, as nvdisasm prints it.
SASS = """
.section .text.f,"ax"
.text.f:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   ISETP.GT.AND P0, PT, R2, R3, PT ;
        /*0020*/               @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   IMAD.WIDE.U32 R8, R8, -0x326172a9, RZ ;
        /*0050*/                   FMUL R4, R4, R5 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0090*/              @!P1 STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_3:
        /*00a0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00b0*/              @!P2 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def count(sass, element_size=2):
    return cuda_static.count_flat("f", cuda_static.functions(sass)["f"], element_size)


def test_counts_the_way_of_a_whole_tile():
    once = {"instructions": 9, "alu": 2, "wide_multiplies": 1}
    assert count(SASS) == once
    assert count(SASS, element_size=4) == {column: 2 * n for column, n in once.items()}


def test_the_only_store_may_be_predicated():
    narrow = SASS.replace("@!P1 STG.E.128", "@!P1 STG.E.U16")
    assert count(narrow.replace(" STG.E.128", "@P1 STG.E.128")) == count(SASS)


@pytest.mark.parametrize("store", ["STG.E.EF.128", "STG.E.128.STRONG.GPU", "STG.E.NA.128"])
@pytest.mark.parametrize("load", ["LDG.E.EF.128", "LDG.E.128.CONSTANT", "LDG.E.NA.LTC128B.128"])
def test_accesses_with_a_cache_modifier(store, load):
    assert count(SASS.replace("STG.E.128", store).replace("LDG.E.128", load)) == count(SASS)


@pytest.mark.parametrize(
    ("code", "alu"),
    [
        ("LOP3.LUT", 1), ("IADD3.X", 1), ("VIADD", 1), ("SHF.R.W.U32.HI", 1), ("SEL", 1),
        ("FSEL", 1), ("ISETP.GE.U32.AND", 1), ("F2FP.BF16.F32.PACK_AB", 1), ("MOV", 1), ("R2P", 1),
        ("IMAD.WIDE.U32", 0), ("IMAD.MOV.U32", 0), ("FFMA", 0), ("FMUL", 0), ("SHFL.IDX", 0),
        ("UIADD3", 0), ("ULOP3.LUT", 0), ("BRA", 0), ("LDC.64", 0), ("DFMA", 0), ("MUFU.EX2", 0),
    ],
)  # fmt: skip
def test_what_the_alu_does(code, alu):
    assert bool(cuda_static.ALU.match(code)) == alu


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("LDG.E.128 R4", "LDG.E.64 R4"), ("STG.E.128 desc[UR4][R2.64], R4 ;\n        /*0070*/", "")],
)
def test_narrow_accesses_are_noticed(right, wrong):
    assert SASS.count(right) == 1
    with pytest.raises(StaticError):
        count(SASS.replace(right, wrong))


def row(**columns):
    before = {"instructions": 95, "alu": 58, "wide_multiplies": 19.25, "registers": 72}
    columns = {name: str(n) for name, n in (before | columns).items()}
    return {"nvcc": "13.0", "arch": "sm_90", "kernel": "dropout", "dtype": "bfloat16", **columns}


# 72 registers fit 28 warps, as 73 to 80 fit 25 and 65 to 72 fit 28; 116 cycles are the ALU's.
@pytest.mark.parametrize(
    ("columns", "is_worse"),
    [
        ({}, False),
        ({"alu": 58.25}, True),
        ({"alu": 57, "instructions": 114}, False),
        ({"instructions": 116}, False),
        ({"instructions": 116.25}, True),
        ({"wide_multiplies": 19.5}, True),
        ({"registers": 65}, False),
        ({"registers": 73}, True),
    ],
)
def test_more_of_what_limits_is_worse(columns, is_worse):
    worse, notes = cuda_static.compare(row(**columns), row())
    assert bool(worse) == is_worse
    assert len(notes) == len(columns)
    # Another compiler's figures say nothing.
    assert not cuda_static.compare({**row(**columns), "nvcc": "1.0"}, row())[0]


def test_sixteen_bits_take_one_philox_call():
    assert cuda_static.compare({**row(wide_multiplies=20.25), "nvcc": "1.0"}, row())[0]
