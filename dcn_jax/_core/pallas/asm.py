"""Arithmetic in the GPU's own instructions, for float32, or for pairs of 16-bit numbers.

    weighted_sum(pixels, weights)      Σ_i  weights_i · pixels_i      rounded to a given dtype
    multiply_pixels(pixels, factors)   pixels · factors               in float32
    split_bfloat16(values)             float32 as the sum of two bfloat16

From `jax.numpy`, Triton compiles a product and a sum to two instructions where the GPU has one. It
moves the terms of the sum, not the sum, through shared memory to the next matrix product. It leaves
instructions with side effects in place, so those here are marked as having some. The mark needs
private parts of Pallas; without them, results are the same.
"""

import functools
import operator
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
    _pinned_p = None
else:
    _pinned_p = Primitive("pinned_inline_asm")
    _pinned_p.multiple_results = True
    _pinned_p.def_effectful_abstract_eval(_abstract_eval)

    def _lower_pinned(context, *operands, **options):
        [made] = _lower(context, *operands, **options)  # the only result, or a list of all results
        results = [made] if len(context.avals_out) == 1 else list(made)
        results[0].owner.attributes["pure"] = ir.BoolAttr.get(False)
        return results

    triton_lowering_rules[_pinned_p] = _lower_pinned

# Instructions that unpack two 16-bit numbers from one register to float32, and pack them again.
_UNPACK = {
    "bfloat16": "shl.b32 {low}, {packed}, 16; and.b32 {high}, {packed}, 0xffff0000;",
    "float16": "mov.b32 {{h0, h1}}, {packed}; cvt.f32.f16 {low}, h0; cvt.f32.f16 {high}, h1;",
}
_PACK = {
    "bfloat16": "cvt.rn.bf16x2.f32 {packed}, {high}, {low};",
    "float16": "cvt.rn.f16x2.f32 {packed}, {high}, {low};",
}


def weighted_sum(pixels: Sequence[jax.Array], weights: Sequence[jax.Array], dtype, *, interpret: bool) -> jax.Array:
    """Σ_i weights_i · pixels_i, summed in float32: pixels `(N, C)` of one dtype, weights `(N,)` -> `(N, C)` of `dtype`."""
    shape, narrow, count = pixels[0].shape, pixels[0].dtype.name, len(pixels)
    weights = [jnp.broadcast_to(weight[:, None], shape) for weight in weights]
    if interpret:
        terms = [w * p.astype(jnp.float32) for w, p in zip(weights, pixels, strict=True)]
        return functools.reduce(operator.add, terms).astype(dtype)
    packed = narrow in _PACK and jnp.dtype(dtype).name == narrow
    sums = ["low", "high"] if packed else ["low"]
    lines = []
    for i in range(count):
        if packed:
            lines.append(_UNPACK[narrow].format(packed=f"${1 + i}", low="x0", high="x1"))
        for n, total in enumerate(sums):
            pixel, weight = f"x{n}" if packed else f"${1 + i}", f"${1 + count + i * len(sums) + n}"
            multiply, rest = ("mul", "") if i == 0 else ("fma", f", {total}")
            lines.append(f"{multiply}.rn.f32 {total}, {pixel}, {weight}{rest};")
    if not packed:
        pixels = [p.astype(jnp.float32) for p in pixels]
    lines.append(_PACK[narrow].format(packed="$0", low="low", high="high") if packed else "mov.b32 $0, low;")
    [total] = _run_asm(lines, [*pixels, *weights], dtype if packed else jnp.float32)
    return total.astype(dtype)


def multiply_pixels(pixels: jax.Array, factors: jax.Array, *, interpret: bool) -> jax.Array:
    """Pixels `(N, C)` times float32 factors `(N, C)`, in float32. `interpret`: in Pallas's interpreter."""
    narrow = pixels.dtype.name
    if interpret:
        return pixels.astype(jnp.float32) * factors
    if narrow not in _PACK:
        lines = ["mul.rn.f32 $0, $1, $2;"]
    else:
        unpack = _UNPACK[narrow].format(packed="$2", low="x0", high="x1")
        lines = [unpack, "mul.rn.f32 $0, x0, $3;", "mul.rn.f32 $1, x1, $4;"]
    [product] = _run_asm(lines, [pixels, factors], jnp.float32)
    return product


def split_bfloat16(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 numbers `(N, C)` as the nearest bfloat16 and the rest, rounded. On a GPU alone.

    Infinity becomes the largest finite bfloat16 and a rest of inf. (inf leaves inf - inf = NaN.)
    """
    if _pinned_p is None:  # Pallas's own primitive allows one result only
        largest = float(jnp.finfo(jnp.bfloat16).max)
        near = jnp.clip(values, -largest, largest).astype(jnp.bfloat16)
        return near, (values - near.astype(jnp.float32)).astype(jnp.bfloat16)
    unpack, pack = _UNPACK["bfloat16"], _PACK["bfloat16"]
    lines = [
        "cvt.rn.satfinite.bf16x2.f32 $0, $3, $2;",
        unpack.format(packed="$0", low="x0", high="x1"),
        "sub.rn.f32 x0, $2, x0;",
        "sub.rn.f32 x1, $3, x1;",
        pack.format(packed="$1", low="x0", high="x1"),
    ]
    near, rest = _run_asm(lines, [values], jnp.bfloat16, jnp.bfloat16)
    return near, rest


def _run_asm(lines: Sequence[str], arrays: Sequence[jax.Array], *dtypes) -> Sequence[jax.Array]:
    """Run instructions on arrays of one shape, element by element.

    If any dtype has 16 bits, the instructions run on two neighbouring elements at a time. $0, $1, …
    are registers, those of the results (one result for each of `dtypes`) before those of the
    arrays. Two 16-bit elements share one register; each 32-bit element has its own.
    """
    together = 4 // min(jnp.dtype(dtype).itemsize for dtype in (*dtypes, *(array.dtype for array in arrays)))

    def registers(dtype):
        return ["r"] if jnp.dtype(dtype).itemsize == 2 else ["f"] * together

    # "&": results are written before all arrays have been read, so they must not share registers.
    outputs = [f"=&{register}" for dtype in dtypes for register in registers(dtype)]
    inputs = [register for array in arrays for register in registers(array.dtype)]
    options = {
        "asm": f"{{ .reg .b16 h0, h1; .reg .b32 low, high, x0, x1; {' '.join(lines)} }}",
        "constraints": ",".join(outputs + inputs),
        "pack": together,
        "result_shape_dtypes": tuple(jax.ShapeDtypeStruct(arrays[0].shape, dtype) for dtype in dtypes),
    }
    if _pinned_p is None:
        return triton.elementwise_inline_asm(args=arrays, **options)
    return _pinned_p.bind(*arrays, **options)
