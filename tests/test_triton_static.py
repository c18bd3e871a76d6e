"""tools/triton_static.py: its table, and how it reads what Inductor and Triton have written."""

import pytest

from tools import triton_static
from tools.cuda_static import StaticError


def test_the_table_is_complete_and_meets_the_bars():
    passes = {
        str(pattern): ("forward", "backward") if pattern.training else ("forward",)
        for pattern in triton_static.PATTERNS
    }
    rows = {
        (pattern, dropout, f"sm_{arch}", which)
        for pattern in passes
        for dropout in triton_static.DROPOUTS
        for arch in triton_static.ARCHS
        for which in passes[pattern]
    }
    table = triton_static.recorded()
    assert set(table) == rows
    assert not triton_static.missed(list(table.values()))


# Two kernels and a call, as Inductor writes them, but for what is not read.
CODE = """
triton_red_fused_0 = async_compile.triton('triton_red_fused_0', '''
@triton.jit
def triton_red_fused_0(in_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr, R0_BLOCK : tl.constexpr):
    xnumel = 100
    r0_numel = 5000
    rnumel = r0_numel
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        pass
    for r0_offset in range(0, r0_numel, R0_BLOCK):
        pass
''', device_str='cuda')

triton_per_fused_1 = async_compile.triton('triton_per_fused_1', '''
    inductor_meta={'RSPLIT_SIZE': 16}
def triton_per_fused_1(in_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr):
    xnumel = 8192
    r0_numel = 256
    R0_BLOCK: tl.constexpr = 256
    for _ in tl.range(0, split_size, XBLOCK, num_stages=NUM_STAGES):
        pass
''', device_str='cuda')

    buf0 = torch.ops.dropout_ext.keep_bits.default(arg5_1, 0.1, [8192, 256], [256, 1], 0)
    assert_size_stride(buf0, (262144, ), (1, ), 'torch.ops.dropout_ext.keep_bits.default')
"""


def test_reads_the_kernels():
    reduction, split = triton_static.kernels(CODE).values()
    assert triton_static.sizes(reduction) == {"xnumel": 100, "r0_numel": 5000}
    blocks = {"XBLOCK": 8, "R0_BLOCK": 2048}
    assert triton_static.trips(reduction, blocks) == 3
    assert triton_static.programs(reduction, blocks) == 13
    constants = triton_static.constexprs(split)
    assert constants == {"R0_BLOCK": 256, "RSPLIT_SIZE": 16}
    assert triton_static.trips(split, {**constants, "XBLOCK": 2}) == 8
    assert triton_static.programs(split, {**constants, "XBLOCK": 2}) == 512
    assert triton_static.calls(CODE, "keep_bits") == 1
    assert triton_static.calls(CODE, "apply") == 0
    with pytest.raises(StaticError, match="loops that go round"):
        triton_static.trips(reduction.replace("range(0, r0_numel", "range(0, 9", 1), blocks)


# A loop with a branch in it, and what follows an exit.
BODY = """
 MOV R1, c[0x0][0x28] ;
.L_x_1:
 @P0 BRA `(.L_x_2) ;
 LDG.E.128 R4, desc[UR4][R2.64] ;
 FFMA R4, R5, R6, R4 ;
.L_x_2:
 IADD3 R2, R2, 0x1, RZ ;
 @!P2 BRA `(.L_x_1) ;
 STG.E.128 desc[UR4][R2.64], R4 ;
 EXIT ;
.L_x_3:
 BRA `(.L_x_3) ;
 NOP ;
""".strip().splitlines()


def test_counts_loops_as_often_as_they_go_round():
    body = [line.strip() for line in BODY]
    counts = triton_static.by_unit(triton_static.executed(body, 10))
    assert counts == {"instructions": 1 + 5 * 10 + 2, "alu": 11, "fma": 10, "memory": 11}
    with pytest.raises(StaticError, match="the source does not have"):
        triton_static.executed(body, 1)


def row(dropout="ours, fused", **columns):
    numbers = {"instructions": 60, "alu": 22, "fma": 23, "memory": 7, "ours": 7.5, "bytes": 8.25}
    what = {"torch": "2.13.0", "triton": "3.7.1", "arch": "sm_90", "pass": "forward"}
    what |= {"pattern": str(triton_static.PATTERNS[0]), "dropout": dropout}
    return what | {name: str(n) for name, n in (numbers | columns).items()}


@pytest.mark.parametrize(
    ("columns", "is_worse"),
    [
        ({}, False),
        ({"instructions": 60.12}, True),
        ({"bytes": 8.5}, True),
        ({"ours": 8}, True),
        ({"instructions": 59}, False),
        ({"alu": 25}, False),
    ],
)
def test_more_of_ours_is_worse(columns, is_worse):
    worse, notes = triton_static.compare(row(**columns), row())
    assert bool(worse) == is_worse
    assert len(worse + notes) == len(columns)
    assert not triton_static.compare(row("F.dropout", **columns), row("F.dropout"))[0]
    other = {**row(), "triton": "1.0"}
    assert not triton_static.compare(row(**columns), other)[0]
    assert triton_static.compare(row(**columns), None)[0]


@pytest.mark.parametrize(
    ("columns", "misses"),
    [
        ({}, False),
        ({"instructions": 83}, True),
        ({"bytes": 8.31}, True),
        ({"instructions": 150, "arch": "sm_80"}, True),
        ({"bytes": 9, "arch": "sm_80"}, False),
    ],
)
def test_bars(columns, misses):
    theirs = row("F.dropout", instructions=157, ours=0, arch=columns.get("arch", "sm_90"))
    assert bool(triton_static.missed([row(**columns), theirs])) == misses
