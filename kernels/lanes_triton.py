"""Assembly for Gluon kernels whose tensors have one element for each thread: shared memory, and products of operands
in registers. `tests/lanes_cases.py` says in torch what each function does.

Places in shared memory are bytes from the beginning of the program's, where a kernel's only buffer lies. A lane of a
product m16n8k16 is 4·g + t. Of A it has four registers of two bf16: columns 2·t and 2·t + 1 of row g, then of row
g + 8, then both of the columns 8 further on; of B, rows 2·t and 2·t + 1 of column g, and those 8 further on; of the
result, columns 2·t and 2·t + 1 of row g and of row g + 8.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def base_of(like):
    """Address of the program's shared memory, int32."""
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [like], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def words_at(offset, base):
    """int32 in shared memory."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 a; add.u32 a, $1, $2; ld.shared.b32 $0, [a]; }", "=r,r,r", [offset, base], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pairs_at(offset, base):
    """Two int32 beside each other in shared memory."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 a; add.u32 a, $2, $3; ld.shared.v2.b32 {$0, $1}, [a]; }", "=r,=r,r,r", [offset, base],
        dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def store_words(value, offset, base):
    """int32 into shared memory."""
    gl.inline_asm_elementwise(
        "{ .reg .u32 a; add.u32 a, $2, $3; st.shared.b32 [a], $1; mov.u32 $0, 0; }", "=r,r,r,r", [value, offset, base],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def four_words(source):
    """Beside each other in memory, from a multiple of 16 bytes on."""
    return gl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [source.to(gl.int64, bitcast=True)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@constexpr_function
def copy_ptx(count):
    """Chunks of a tile's codes, 8 rows of a record apart. $1: where to, $2: base, $3: from."""
    lines = [f"cp.async.cg.shared.global [a+{256 * row}], [$3+{1024 * row}], 16;" for row in range(count)]
    return "{ .reg .u32 a; add.u32 a, $1, $2; " + " ".join(lines) + " cp.async.commit_group; mov.u32 $0, 0; }"


@gluon.jit
def copy_codes(source, offset, base, COUNT: gl.constexpr):
    """Chunks of this lane, as a group. source: int64 addresses."""
    PTX: gl.constexpr = copy_ptx(COUNT)
    gl.inline_asm_elementwise(PTX, "=r,r,r,l", [offset, base, source], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_copies(like, GROUPS: gl.constexpr):
    """Until all but the last groups are there, and all lanes here."""
    gl.inline_asm_elementwise(
        f"cp.async.wait_group {GROUPS}; bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,r", [like], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def product(d, a, b):
    """m16n8k16 of bf16, added to the four of d."""
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def permuted(a, b, selector):
    """Bytes of a (0 … 3) and b (4 … 7)."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def both(a, b, SELECTOR: gl.constexpr):
    """As `permuted`, with a selector known beforehand."""
    return gl.inline_asm_elementwise(
        f"prmt.b32 $0, $1, $2, {SELECTOR};", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def rounded(low, high):
    """Two FP32 as bf16 in an int32."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def across(x, MASK: gl.constexpr):
    """int32 of the lane whose number differs in MASK."""
    return gl.inline_asm_elementwise(
        f"shfl.sync.bfly.b32 $0, $1, {MASK}, 0x1f, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def across_float(x, MASK: gl.constexpr):
    """FP32 of the lane whose number differs in MASK."""
    return across(x.to(gl.int32, bitcast=True), MASK).to(gl.float32, bitcast=True)


@gluon.jit
def largest(x):
    """Of the eight lanes of a query."""
    x = gl.maximum(x, across_float(x, 1))
    x = gl.maximum(x, across_float(x, 2))
    return gl.maximum(x, across_float(x, 16))


@gluon.jit
def summed(x):
    """Over the eight lanes of a query."""
    x += across_float(x, 1)
    x += across_float(x, 2)
    return x + across_float(x, 16)


@constexpr_function
def rows_ptx(chunks, last):
    """Chunks of 16 bytes beside each other, lane by lane. $1: where to, $2: lane, $3: base, $4: from."""
    lines = ["{ .reg .u32 a; .reg .u64 b; .reg .pred p; shl.b32 a, $2, 4; cvt.u64.u32 b, a; add.u64 b, b, $4;"]
    lines.append("add.u32 a, a, $1; add.u32 a, a, $3;")
    for start in range(0, chunks, 32):
        if start + 32 > chunks:
            lines.append(f"setp.lt.u32 p, $2, {chunks - start}; @p")
        lines.append(f"cp.async.cg.shared.global [a+{16 * start}], [b+{16 * start}], 16;")
    return " ".join(lines) + (" cp.async.commit_group;" if last else "") + " mov.u32 $0, 0; }"


@gluon.jit
def copy_rows(source, offset, lane, base, CHUNKS: gl.constexpr, LAST: gl.constexpr):
    """A warp's copy of CHUNKS · 16 bytes, of a group that the LAST one closes. source: int64 addresses."""
    PTX: gl.constexpr = rows_ptx(CHUNKS, LAST)
    gl.inline_asm_elementwise(PTX, "=r,r,r,r,l", [offset, lane, base, source], dtype=gl.int32, is_pure=False, pack=1)
