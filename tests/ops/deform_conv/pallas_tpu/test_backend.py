"""The TPU kernels for bounded offsets, in Pallas's interpreter: `implementation="pallas_tpu"`."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dcn_jax import deform_conv, select_implementation
from dcn_jax._core.pallas.launch import interpret
from tests.support import oracle
from tests.support.bounded import check_against_oracle, gradients_of
from tests.support.cases import draw
from tests.support.running import assert_close, compiled, value_and_gradients

pallas_tpu = functools.partial(deform_conv, implementation="pallas_tpu")
exact = functools.partial(pallas_tpu, precision="highest")
SMALL = draw((2, 5, 4, 3), (3, 3), 2)
BOUND = 2  # some offsets are beyond it, some at it


@pytest.fixture
def interpreted():
    with interpret():
        yield


# A tile has 6 × 8 positions. Neighbouring strips read some of the same rows. A test takes seconds in the interpreter.
CASES = {
    "ragged tiles": (draw((2, 14, 9, 3), (3, 3), 4), 2),
    "one tap that stays": (draw((1, 7, 9, 2), (1, 1), 3), 0),
}
SLOW = {
    "one tile": (SMALL, 2),
    "three tiles": (draw((1, 7, 17, 3), (3, 3), 4), 2),
    "whole tiles, no mask": (draw((1, 12, 8, 2), (3, 3), 2, mask=False, bias=False, padding="VALID"), 2.5),
    "far": (draw((1, 7, 3, 2), (3, 1), 2), 8),
    "dilated, padded unevenly": (draw((1, 6, 7, 2), (2, 3), 3, kernel_dilation=2, padding=((0, 3), (2, 1))), 1.5),
    "cropped": (draw((1, 9, 11, 2), (2, 2), 2, padding=((-2, 1), (1, -3))), 0.5),
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        *(pytest.param(*case, id=name) for name, case in CASES.items()),
        *(pytest.param(*case, id=name, marks=slow) for name, case in SLOW.items()),
    ],
)
def test_float32(interpreted, case, bound):
    check_against_oracle(functools.partial(exact, max_offset=bound), case, bound, 1e-5)


@slow
@pytest.mark.parametrize(("precision", "tolerance"), [("high", 5e-5), (None, 1e-2)])
def test_float32_of_bfloat16_products(interpreted, precision, tolerance):
    """`precision` means what it means to a TPU's compiler."""
    op = functools.partial(pallas_tpu, precision=precision, max_offset=BOUND)
    check_against_oracle(op, SMALL, BOUND, tolerance)


def test_reading_between_pixels_is_finer_than_one_bfloat16_product(interpreted):
    """With a kernel of one, the derivative by the modulation is the sample."""
    x = jnp.full((3, 3, 1), 1 + 2.0**-12, jnp.float32)
    kernel, offset, mask = jnp.ones((1, 1, 1, 1)), jnp.full((3, 3, 2), 0.3), jnp.ones((3, 3, 1))
    read = jax.jit(jax.grad(lambda mask: jnp.sum(pallas_tpu(x, kernel, offset, mask, max_offset=1))))(mask)
    np.testing.assert_allclose(read[:2, :2], 1 + 2.0**-12, rtol=0, atol=2.0**-14)


def test_bfloat16(interpreted):
    case = draw((1, 5, 4, 3), (3, 3), 4, bias=False)
    x, kernel, *rest = case.arrays
    case = case._replace(arrays=(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), *rest))
    check_against_oracle(functools.partial(pallas_tpu, max_offset=BOUND), case, BOUND, 8e-3, gradients=1e-2)


def test_weights_are_finer_than_bfloat16(interpreted):
    """Samples are rounded once, to bfloat16. Weights are not."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((9, 11, 8)), jnp.bfloat16)
    kernel, offset = jnp.eye(8, dtype=jnp.bfloat16)[None, None], rng.uniform(0.1, 0.9, (9, 11, 2)).astype(np.float32)
    y = jax.jit(functools.partial(pallas_tpu, max_offset=1))(x, kernel, offset)
    wanted = jnp.asarray(oracle.deform_conv(np.float64(x), np.float64(kernel), offset), jnp.bfloat16)
    assert jnp.mean(y == wanted) > 0.98


@slow
def test_offset_and_mask_in_float64(interpreted, x64):
    """With a float32 map. Gradients of float64 arrays are float64."""
    x, kernel, offset, mask, bias = SMALL.arrays
    case = SMALL._replace(arrays=(x, kernel, np.float64(offset), np.float64(mask), bias))
    check_against_oracle(functools.partial(exact, max_offset=BOUND), case, BOUND, 1e-5)


@slow
def test_at_whole_numbers_the_derivative_is_the_right_hand_one(interpreted):
    """Also for an offset just below one: added to a position in float32, it would be rounded to one."""
    _, kernel, offset, mask, bias = SMALL.arrays
    offset = np.where(np.arange(offset.size).reshape(offset.shape) % 2, np.float32(1), np.float32(1 - 2.0**-24))
    case = SMALL._replace(arrays=(SMALL.arrays[0], kernel, offset.astype(np.float32), mask, bias))
    check_against_oracle(functools.partial(exact, max_offset=BOUND), case, BOUND, 1e-5)


def test_a_nan_offset_disturbs_its_own_position_alone(interpreted):
    x, kernel, offset, mask, bias = SMALL.arrays
    hostile = offset.copy()
    hostile[0, 0, 0, :2] = np.inf, -np.inf
    hostile[1, 2, 1, 4] = np.nan
    y = compiled(exact, max_offset=BOUND)(x, kernel, hostile, mask, bias)
    wanted = np.array(compiled(deform_conv, max_offset=BOUND)(x, kernel, hostile, mask, bias))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-4)
    assert np.all(np.isnan(y[1, 2, 1]))
    assert np.sum(np.isnan(y)) == y.shape[-1]


@slow
def test_one_set_of_offsets_serves_all_images_and_batch_axes_may_be_any(interpreted):
    x, kernel, offset, mask, bias = draw((4, 3, 4, 2), (3, 3), 2).arrays
    given = x.reshape(2, 2, *x.shape[1:]), kernel, offset[0], mask[:1], bias
    run = functools.partial(value_and_gradients, functools.partial(exact, max_offset=BOUND))
    by_xla = functools.partial(value_and_gradients, functools.partial(deform_conv, max_offset=BOUND))
    cotangent = np.random.default_rng(1).standard_normal((2, 2, 3, 4, 2)).astype(np.float32)
    results = jax.jit(run)(given, cotangent), jax.jit(by_xla)(given, cotangent)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *results)


@slow
def test_vmap_and_derivatives_of_derivatives(interpreted):
    """Several kernels share all other arrays. Derivatives after the first are computed by XLA."""
    x, kernel, offset, mask, bias = SMALL.arrays
    stacked = x, np.stack([kernel, -kernel, 2 * kernel]), offset, mask, bias
    axes = (None, 0, None, None, None)

    def second(op, *arrays):
        def squares(*arrays):
            return sum(jnp.sum(g**2) for g in gradients_of(op, SMALL)(*arrays))

        return jax.grad(squares, argnums=(0, 1, 2, 3))(*arrays)

    ops = functools.partial(exact, max_offset=BOUND), functools.partial(deform_conv, max_offset=BOUND)
    together = [jax.jit(jax.vmap(functools.partial(second, op), axes))(*stacked) for op in ops]
    jax.tree.map(functools.partial(assert_close, tolerance=2e-5), *together)


def tangents(op, *arrays):
    return jax.jvp(op, arrays, arrays)


def tangents_of_gradients(op, *arrays):
    gradient, along = jax.linearize(gradients_of(op, SMALL), *arrays)
    return gradient, along(*arrays)


@pytest.mark.parametrize("program", [tangents, tangents_of_gradients])
def test_forward_mode(interpreted, program):
    """Of the op and of its gradients. Tangents of offsets at the bound and beyond it are ignored, as by XLA."""
    ops = functools.partial(exact, max_offset=BOUND), functools.partial(deform_conv, max_offset=BOUND)
    assert np.any(np.abs(SMALL.arrays[2]) >= BOUND)
    results = [jax.jit(functools.partial(program, op))(*SMALL.arrays) for op in ops]
    jax.tree.map(functools.partial(assert_close, tolerance=2e-5), *results)


@slow
def test_shard_map(interpreted):
    """Without `check_vma`, which fails on the interpreter's own loops. A compiled program passes it."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    over, op = P("data"), functools.partial(exact, max_offset=BOUND)
    over_devices = jax.shard_map(op, mesh=mesh, in_specs=(over, P(), over, over, P()), out_specs=over, check_vma=False)
    cotangent = np.random.default_rng(1).standard_normal((2, 5, 4, 2)).astype(np.float32)
    results = [jax.jit(functools.partial(value_and_gradients, f))(SMALL.arrays, cotangent) for f in (over_devices, op)]
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *results)


REFUSED = {
    "no bound": ({"max_offset": None}, r"max_offset=None \(.*give a bound of at most 8 pixels\)"),
    "a large bound": ({"max_offset": 8.5}, r"max_offset=8.5 \(.*at most 8"),
    "1-D": ({"x": (2, 9, 4), "kernel": (3, 4, 5), "offset": (2, 9, 3)}, "it has 1 spatial axes"),
    "taps": ({"kernel": (5, 5, 4, 5), "offset": (2, 9, 9, 50)}, "kernel has 25 taps"),
    "strides": ({"strides": 2, "offset": (2, 5, 5, 18)}, r"strides=\(2, 2\)"),
    "dilation": ({"kernel_dilation": (1, 3)}, r"kernel_dilation=\(1, 3\)"),
    "padding_mode": ({"padding_mode": "wrap"}, r"padding_mode=\('wrap', 'wrap'\)"),
    "groups": ({"feature_group_count": 2, "kernel": (3, 3, 2, 6)}, "it has feature_group_count=2 and 1 offset groups"),
    "offset groups": ({"offset": (2, 9, 9, 36)}, "it has feature_group_count=1 and 2 offset groups"),
    "dtype": ({"dtype": jnp.float16}, "x and kernel have dtype float16"),
    "precision": ({"precision": lax.DotAlgorithmPreset.F64_F64_F64}, "precision=.*F64_F64_F64"),
    "a wide map": ({"x": (1, 9, 9000, 4), "offset": (1, 9, 9000, 18)}, r"x of shape \(1, 9, 9000, 4\) .* takes \d+ MiB on"),
    "a large kernel": ({"kernel": (3, 3, 2048, 2048), "x": (2, 9, 9, 2048)}, r"x of shape .* with kernel of shape \(3, 3, 2048, 2048\) takes \d+ MiB on"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_calls_say_why(interpreted, change, message):
    change = {"x": (2, 9, 9, 4), "kernel": (3, 3, 4, 5), "offset": (2, 9, 9, 18), "max_offset": 4} | change
    dtype = change.pop("dtype", jnp.float32)
    x, kernel = (jax.ShapeDtypeStruct(change.pop(name), dtype) for name in ("x", "kernel"))
    offset = jax.ShapeDtypeStruct(change.pop("offset"), jnp.float32)
    for call in (select_implementation, lambda *a, **k: jax.eval_shape(functools.partial(deform_conv, **k), *a)):
        with pytest.raises(
            ValueError, match=f"'pallas_tpu' cannot take this call: {message}.*; use implementation='xla'"
        ):
            call(x, kernel, offset, implementation="pallas_tpu", **change)


def test_symbolic_sizes_are_refused(interpreted):
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, 5, 4, 3), (3, 3, 3, 2), (b, 5, 4, 18))]
    with pytest.raises(ValueError, match=r"x has the symbolic shape \(b, 5, 4, 3\)"):
        select_implementation(*shapes, max_offset=BOUND, implementation="pallas_tpu")


def test_a_refusal_gives_all_reasons(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float16) for shape in ((2, 9, 4), (3, 4, 5), (2, 9, 3))]
    reasons = "max_offset=None", "1 spatial axes", "dtype float16", "runs on TPUs, and JAX's backend here is 'cpu'"
    with pytest.raises(ValueError, match=".*; and .*".join(reasons)):
        select_implementation(*shapes, implementation="pallas_tpu")


def test_it_is_taken_by_name_alone(interpreted):
    arrays = SMALL.arrays[:4]
    assert select_implementation(*arrays, max_offset=BOUND)[0] == "xla"
    assert select_implementation(*arrays, max_offset=BOUND, implementation="pallas_tpu") == (
        "pallas_tpu",
        "asked for by name",
    )


def test_lowered_for_another_platform_it_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    traced = jax.jit(functools.partial(pallas_tpu, max_offset=BOUND)).trace(*SMALL.arrays)
    with pytest.raises(ValueError, match="implementation='pallas_tpu' runs on TPUs alone"):
        traced.lower(lowering_platforms=("cpu",))


def lowered(monkeypatch, program, *arrays):
    """`program(op, *arrays)`, lowered for a TPU, as text. That needs no TPU."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    traced = jax.jit(functools.partial(program, functools.partial(pallas_tpu, max_offset=BOUND))).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def gradients_of_map(op, x, *rest):
    return gradients_of(jax.vmap(op, (0, None, 0, 0, None)), SMALL)(x, *rest)


@pytest.mark.parametrize("context", ["high", "highest", "BF16_BF16_F32_X3"])
def test_products_of_bfloat16_ignore_the_precision_that_is_set(monkeypatch, context):
    """With most of these settings JAX cannot lower a product inside a TPU kernel. "highest" would make it slower."""

    def gradients(op, *arrays):
        return gradients_of(functools.partial(op, precision="default"), SMALL)(*arrays)

    wanted = lowered(monkeypatch, gradients, *SMALL.arrays)
    with jax.default_matmul_precision(context):
        assert lowered(monkeypatch, gradients, *SMALL.arrays) == wanted


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (tangents, ["forward"]),
        (tangents_of_gradients, ["backward", "forward"]),
        (gradients_of_map, ["backward", "forward"]),
    ],
)
def test_one_launch_for_each_pass(monkeypatch, program, wanted, wide):
    """Tangents, and derivatives of gradients, are computed by XLA."""
    with jax.enable_x64(wide):
        text = lowered(monkeypatch, program, *SMALL.arrays)
    assert sorted(re.findall(r'kernel_name = "deform_conv_(\w+)"', text)) == wanted
