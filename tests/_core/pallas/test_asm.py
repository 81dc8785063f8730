"""Arithmetic in the GPU's own instructions: its results in the interpreter, and its text in a kernel."""

import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.triton import lowering

from dcn_jax._core.pallas import asm, blocks
from dcn_jax._core.pallas.launch import launch
from tests.support import aot

COUNT, SHAPE = 3, (16, 8)


def draw(dtype):
    """Pixels, weights and factors."""
    rng = np.random.default_rng(0)
    pixels = [jnp.asarray(rng.standard_normal(SHAPE), dtype) for _ in range(COUNT)]
    weights = [jnp.asarray(rng.standard_normal(SHAPE[0]), jnp.float32) for _ in range(COUNT)]
    return pixels, weights, jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_interpreter_sums_in_float32_and_rounds_once(dtype):
    pixels, weights, factor = draw(dtype)
    exact = sum(np.float64(w)[:, None] * np.float64(p) for w, p in zip(weights, pixels, strict=True))
    for rounded in {jnp.dtype(dtype), jnp.dtype(jnp.float32)}:
        sums = asm.weighted_sum(pixels, weights, rounded, interpret=True)
        assert sums.dtype == rounded
        np.testing.assert_allclose(np.float64(sums), exact, rtol=0.51 * float(jnp.finfo(rounded).eps), atol=1e-6)
    product = asm.multiply_pixels(pixels[0], factor, interpret=True)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, np.float64(pixels[0]) * np.float64(factor), rtol=1e-6)


def instructions(given, dtype, rounded):
    """(instructions, printed options) of each inline assembly in a kernel that calls all three functions."""

    def body(pixels_ref, wide_ref, sums_ref, products_ref, near_ref, left_ref):
        rows, columns = blocks.block(0, SHAPE[0], SHAPE[0]), blocks.block(0, SHAPE[1], SHAPE[1])
        matrix, first = blocks.outer(rows, columns), np.int32(0)
        pixels, wide = blocks.load(pixels_ref, matrix), blocks.load(wide_ref, matrix)
        weight = blocks.load(wide_ref, blocks.Elements((*rows.index, first), None))
        blocks.store(sums_ref, matrix, given.weighted_sum([pixels] * COUNT, [weight] * COUNT, rounded, interpret=False))
        blocks.store(products_ref, matrix, given.multiply_pixels(pixels, wide, interpret=False))
        near, left = given.split_bfloat16(wide)
        blocks.store(near_ref, matrix, near)
        blocks.store(left_ref, matrix, left)

    def run(pixels, wide):
        made = {"sums": rounded, "products": jnp.float32, "near": jnp.bfloat16, "left": jnp.bfloat16}
        made = {name: jax.ShapeDtypeStruct((1, *SHAPE), kind) for name, kind in made.items()}
        operands = {"pixels": pixels, "wide": wide}
        return launch(body, operands, made, name="t", grid=(1,), warps=1, interpret=False)

    text = aot.triton(run, *(jax.ShapeDtypeStruct((1, *SHAPE), kind) for kind in (dtype, jnp.float32)))
    return re.findall(r'elementwise_inline_asm "(.*?)" (\{.*?\})', text)


@pytest.mark.parametrize(
    ("dtype", "rounded", "together", "sums"),
    [
        (jnp.bfloat16, jnp.bfloat16, 2, 2),
        (jnp.float16, jnp.float16, 2, 2),
        (jnp.float32, jnp.float32, 1, 1),
        (jnp.bfloat16, jnp.float32, 1, 1),
        (jnp.float32, jnp.bfloat16, 1, 1),
    ],
)
def test_a_gpu_multiplies_and_adds_in_one_instruction_that_nothing_moves(dtype, rounded, together, sums):
    (weigh, options), (multiply, _), (split, _) = found = instructions(asm, dtype, rounded)
    assert all("pure = false" in options for _, options in found)
    assert f"packed_element = {together}" in options
    assert (weigh.count("mul.rn.f32"), weigh.count("fma.rn.f32")) == (sums, (COUNT - 1) * sums)
    packed = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}
    assert [name for name, to in packed.items() if to in weigh] == ([jnp.dtype(dtype).name] if together == 2 else [])
    assert multiply.count("mul.rn.f32") == (1 if dtype == jnp.float32 else 2)
    assert re.findall(r"cvt[\w.]*", split) == ["cvt.rn.satfinite.bf16x2.f32", "cvt.rn.bf16x2.f32"]  # inf is left


@pytest.mark.parametrize("gone", ["a module", "a name", "a rule"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_where_pallas_has_changed_its_own_instructions_serve(monkeypatch, gone, dtype):
    """Triton may move them then. Splitting has two results, so it is left to `jax.numpy`."""
    if gone == "a module":
        monkeypatch.setitem(sys.modules, "jax._src.pallas.triton.primitives", None)
    elif gone == "a name":
        monkeypatch.delattr("jax._src.pallas.triton.primitives.elementwise_inline_asm_p")
    else:
        monkeypatch.setattr(lowering, "triton_lowering_rules", {})
    found = importlib.util.spec_from_file_location("asm_elsewhere", asm.__file__)
    elsewhere = importlib.util.module_from_spec(found)
    found.loader.exec_module(elsewhere)
    monkeypatch.undo()
    here, there = instructions(asm, dtype, dtype), instructions(elsewhere, dtype, dtype)
    assert [text for text, _ in there] == [text for text, _ in here[:2]]
    assert all("pure = true" in options for _, options in there)
