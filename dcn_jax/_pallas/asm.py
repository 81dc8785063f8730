"""Sums of products in the GPU's own instructions, two narrow numbers at a time.

    weigh(pixels, weights)     Σ_i  weights_i · pixels_i      rounded to the dtype that is asked for
    multiply(pixels, factor)   pixels · factor                in float32
    split(values)              float32 as the sum of two bfloat16

Why not in `jax.numpy`: Triton multiplies and adds in two instructions where the GPU has one, and it
converts all operands of such a sum to the layout of the matrix product behind it, through shared
memory, where the sum alone would do. An instruction that may have side effects it does not move.
That mark takes private parts of Pallas, in this file alone; where one is missing, the sum is right
and slower.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton
from jax.extend.core import Primitive

try:
    from jax._src.pallas.triton.lowering import triton_lowering_rules
    from jax._src.pallas.triton.primitives import elementwise_inline_asm_p
    from jaxlib.mlir import ir

    _abstract_eval, _lower = elementwise_inline_asm_p.abstract_eval, triton_lowering_rules[elementwise_inline_asm_p]
except (ImportError, AttributeError, KeyError):
    _run = triton.elementwise_inline_asm
else:
    _pinned_p = Primitive("pinned_inline_asm")
    _pinned_p.multiple_results = True
    _pinned_p.def_effectful_abstract_eval(_abstract_eval)

    def _lower_pinned(context, *operands, **options):
        results = _lower(context, *operands, **options)
        results = list(results[0]) if hasattr(results[0], "__len__") else results
        results[0].owner.attributes["pure"] = ir.BoolAttr.get(False)
        return results

    triton_lowering_rules[_pinned_p] = _lower_pinned

    def _run(asm, *, args, constraints, pack, result_shape_dtypes):
        options = {"asm": asm, "constraints": constraints, "pack": pack}
        return _pinned_p.bind(*args, **options, result_shape_dtypes=tuple(result_shape_dtypes))


# How two numbers that share a register are taken from it, and put into one.
_UNPACK = {
    "bfloat16": "shl.b32 {low}, {packed}, 16; and.b32 {high}, {packed}, 0xffff0000;",
    "float16": "mov.b32 {{h0, h1}}, {packed}; cvt.f32.f16 {low}, h0; cvt.f32.f16 {high}, h1;",
}
_PACK = {"bfloat16": "cvt.rn.bf16x2.f32 $0, high, low;", "float16": "cvt.rn.f16x2.f32 $0, high, low;"}
_REGISTERS = ".reg .b16 h0, h1; .reg .b32 low, high, x0, x1;"


def weigh(pixels: Sequence[jax.Array], weights: Sequence[jax.Array], dtype, *, interpret: bool) -> jax.Array:
    """Σ_i weights_i · pixels_i, summed in float32: pixels `(N, C)` of one dtype, weights `(N,)` -> `(N, C)` of `dtype`."""
    shape, narrow, count = pixels[0].shape, pixels[0].dtype.name, len(pixels)
    weights = [jnp.broadcast_to(weight[:, None], shape) for weight in weights]
    if interpret:
        return sum(w * p.astype(jnp.float32) for w, p in zip(weights, pixels, strict=True)).astype(dtype)
    if narrow not in _PACK or dtype != narrow:
        pixels = [p.astype(jnp.float32) for p in pixels]
        lines = [_add("low", f"${1 + i}", f"${1 + count + i}", first=i == 0) for i in range(count)]
        asm = f"{{ {_REGISTERS} {' '.join(lines)} mov.b32 $0, low; }}"
        return _elementwise(asm, pixels, weights, jnp.float32).astype(dtype)
    lines = []
    for i in range(count):
        low, high = (f"${1 + count + 2 * i + half}" for half in (0, 1))
        lines.append(_UNPACK[narrow].format(packed=f"${1 + i}", low="x0", high="x1"))
        lines += [_add("low", "x0", low, first=i == 0), _add("high", "x1", high, first=i == 0)]
    return _elementwise(f"{{ {_REGISTERS} {' '.join(lines)} {_PACK[narrow]} }}", pixels, weights, dtype)


def multiply(pixels: jax.Array, factor: jax.Array, *, interpret: bool) -> jax.Array:
    """pixels `(N, C)` times float32 numbers `(N, C)`, in float32."""
    narrow = pixels.dtype.name
    if interpret:
        return pixels.astype(jnp.float32) * factor
    if narrow not in _PACK:
        return _elementwise("mul.rn.f32 $0, $1, $2;", [pixels], [factor], jnp.float32)
    unpack = _UNPACK[narrow].format(packed="$2", low="x0", high="x1")
    asm = f"{{ {_REGISTERS} {unpack} mul.rn.f32 $0, x0, $3; mul.rn.f32 $1, x1, $4; }}"
    return _elementwise(asm, [pixels], [factor], jnp.float32)


def split(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 numbers as the nearest bfloat16, and what is left, rounded to one."""
    high, low = (
        _UNPACK["bfloat16"].format(packed="$0", low="x0", high="x1"),
        "sub.rn.f32 x0, $2, x0; sub.rn.f32 x1, $3, x1;",
    )
    asm = f"{{ {_REGISTERS} cvt.rn.bf16x2.f32 $0, $3, $2; {high} {low} cvt.rn.bf16x2.f32 $1, x1, x0; }}"
    result = jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)
    high, rest = _run(asm, args=(values,), constraints="=&r,=r,f,f", pack=2, result_shape_dtypes=[result, result])
    return high, rest


def _add(total: str, a: str, b: str, *, first: bool) -> str:
    return f"mul.rn.f32 {total}, {a}, {b};" if first else f"fma.rn.f32 {total}, {a}, {b}, {total};"


def _elementwise(asm: str, narrow: Sequence[jax.Array], wide: Sequence[jax.Array], dtype) -> jax.Array:
    """Run instructions that take arrays of one dtype, then some of float32, and give an array."""
    pack = 4 // narrow[0].dtype.itemsize

    def registers(array_dtype):
        itemsize = jnp.dtype(array_dtype).itemsize
        return ["r"] if itemsize == 2 else ["f"] * pack

    outputs = [f"={register}" for register in registers(dtype)]
    inputs = [register for array in (*narrow, *wide) for register in registers(array.dtype)]
    result = jax.ShapeDtypeStruct(narrow[0].shape, dtype)
    constraints = ",".join(outputs + inputs)
    [made] = _run(asm, args=(*narrow, *wide), constraints=constraints, pack=pack, result_shape_dtypes=[result])
    return made
