"""`dcnv3`: its values and gradients, its orders, and what it shares with the convolution that it stands on."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.export import symbolic_shape
from jax.sharding import AxisType, NamedSharding
from jax.test_util import check_grads

from dcn_jax import dcnv3, deform_conv
from tests.support import dcn_oracle as oracle
from tests.support.programs import collectives
from tests.support.running import assert_close, compiled, value_and_gradients

TORCH = np.load(Path(__file__).parent.parent / "support" / "data" / "dcn.npz")
TORCH_OPTIONS = json.loads(str(TORCH["options"]))["ops"]

CASES = {
    "plain": ((2, 5, 6, 4), 2, {}),
    "no batch": ((4, 5, 6), 3, {}),
    "rectangular": ((2, 4, 5, 4), 1, {"window": (3, 5), "padding": ((1, 2), (2, 1)), "strides": (2, 1)}),
    "even": ((2, 5, 6, 2), 2, {"window": (2, 4), "kernel_dilation": (3, 1), "padding": 2}),
    "stretched": ((2, 5, 6, 4), 4, {"offset_scale": 1.7, "kernel_dilation": (2, 1)}),
    "no centre": ((1, 1, 5, 6, 4), 2, {"remove_center": True, "offset_scale": 0.5, "strides": 2}),
    "one tap": ((2, 3, 4, 2), 1, {"window": (1, 1), "padding": 0}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("plain", "no batch", "one tap") else []) for n in CASES]
)
def test_values_and_gradients(name, x64):
    shape, groups, options = CASES[name]
    arrays = [a.astype(np.float64) for a in oracle.draw(shape, groups, **options)]
    wanted = oracle.dcnv3(*arrays, **options)
    cotangent = np.random.default_rng(1).standard_normal(wanted.shape)
    run = functools.partial(value_and_gradients, functools.partial(dcnv3, **options))
    y, gradients = jax.jit(run)(arrays, cotangent)
    assert_close(y, wanted, 1e-12)
    for gradient, exact in zip(gradients, oracle.gradients(cotangent, *arrays, **options), strict=True):
        assert_close(gradient, exact, 1e-12)


@pytest.mark.parametrize("number", range(len(TORCH_OPTIONS)))
def test_torch_computes_the_same(number, x64):
    options = TORCH_OPTIONS[number]
    arrays = [jnp.asarray(TORCH[f"{number}.{name}"], jnp.float64) for name in ("x", "offset", "mask")]
    run = functools.partial(value_and_gradients, functools.partial(dcnv3, **options))
    y, gradients = jax.jit(run)(arrays, jnp.asarray(TORCH[f"{number}.cotangent"], jnp.float64))
    assert_close(y, TORCH[f"{number}.y"], 1e-12)
    for gradient, name in zip(gradients, ("x", "offset", "mask"), strict=True):
        assert_close(gradient, TORCH[f"{number}.d_{name}"], 1e-11)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-6), ("bfloat16", 4e-3), pytest.param("float16", 5e-4, marks=pytest.mark.slow)],
)
def test_dtypes(dtype, tolerance):
    """x sets the dtype of the result; the offsets keep theirs, and the sums are not rounded on the way."""
    x, offset, mask = map(jnp.asarray, oracle.draw((2, 5, 6, 4), 2, remove_center=True, offset_scale=2.0))
    x, mask = x.astype(dtype), mask.astype(dtype)
    run = functools.partial(value_and_gradients, functools.partial(dcnv3, remove_center=True, offset_scale=2.0))
    y, gradients = jax.jit(run)((x, offset, mask), jnp.ones(x.shape))
    assert y.dtype == dtype
    assert [g.dtype for g in gradients] == [x.dtype, offset.dtype, mask.dtype]
    given = np.float64(x), offset, np.float64(mask)
    assert_close(np.float64(y), oracle.dcnv3(*given, remove_center=True, offset_scale=2.0), tolerance)


def test_taps_run_down_the_columns_and_offsets_are_x_first():
    """A map that tells where it was read: 10 · row + column."""
    x = np.add.outer(10 * np.arange(6), np.arange(7)).astype(np.float32)[..., None]
    offset, masks = np.tile(np.float32([0.25, 0.5]), (6, 7, 9)), np.eye(9, dtype=np.float32)
    read = jax.jit(jax.vmap(lambda mask: dcnv3(x, offset, jnp.broadcast_to(mask, (6, 7, 9)))[3, 3, 0]))(masks)
    places = [33 + 10 * row + column for column in (-1, 0, 1) for row in (-1, 0, 1)]
    np.testing.assert_allclose(read, [place + 0.25 + 10 * 0.5 for place in places], rtol=1e-6)


def test_the_scale_stretches_the_grid_about_its_centre():
    x = np.arange(9, dtype=np.float32)[None, :, None]
    read = compiled(dcnv3, window=(1, 3), padding=(0, 1), offset_scale=1.5)
    for tap, place in enumerate([4 - 1.5, 4, 4 + 1.5]):
        mask = np.tile(np.eye(3, dtype=np.float32)[tap], (1, 9, 1))
        for offset in (0, 0.5):
            y = np.asarray(read(x, np.tile(np.float32([offset, 0]), (1, 9, 3)), mask))
            assert y[0, 4, 0] == place + 1.5 * offset


def test_the_centre_of_an_even_window_is_floored():
    """Dilated by 1, four taps reach from -1 to 2; scaled, the tap at 0 stays."""
    x = np.arange(9, dtype=np.float32)[None, :, None]
    mask = np.tile(np.float32([0, 1, 0, 0]), (1, 8, 1))
    read = compiled(dcnv3, window=(1, 4), padding=((0, 0), (1, 1)), offset_scale=3.0)
    y = read(x, np.zeros((1, 8, 8), np.float32), mask)
    np.testing.assert_array_equal(y[0, :, 0], np.arange(8.0))


def test_it_is_a_depthwise_convolution_of_ones():
    x = jnp.asarray(oracle.draw((2, 5, 6, 4), 1)[0])
    y = compiled(dcnv3)(x, jnp.zeros((2, 5, 6, 18)), jnp.ones((2, 5, 6, 9)))
    ones = jnp.ones((3, 3, 1, 4))
    wanted = compiled(deform_conv, feature_group_count=4)(x, ones, jnp.zeros((2, 5, 6, 18)))
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_derivatives_of_second_order_in_both_modes(x64):
    options = {"window": (1, 3), "padding": (0, 1), "offset_scale": 2.0, "remove_center": True}
    arrays = [a.astype(np.float64) for a in oracle.draw((2, 3, 2), 1, **options)]
    check_grads(jax.jit(functools.partial(dcnv3, **options)), arrays, order=2, modes=["fwd", "rev"], rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"remove_center": True, "offset_scale": 1.5}], ids=["plain", "no centre"])
def test_wild_offsets_and_pixels_disturb_nothing_else(options):
    """An infinite pixel reaches those that read it alone: not the tap that is left out, which would be on it."""
    x, offset, mask = oracle.draw((5, 6, 2), 1, **options)
    program = jax.jit(lambda *a: value_and_gradients(functools.partial(dcnv3, **options), a, jnp.ones_like(a[0])))

    def run(*arrays):
        return jax.tree.map(np.asarray, program(*arrays))

    def put(array, at, number):
        array = array.copy()
        array[at] = number
        return array

    plain, gradients = run(x, offset, mask)
    elsewhere = put(np.ones((5, 6), bool), (2, 3), False)
    for wild in (np.inf, -np.inf, 1e30, np.nan):
        y, (d_x, d_offset, _) = run(x, put(offset, (2, 3), wild), mask)
        np.testing.assert_array_equal(y[elsewhere], plain[elsewhere])
        np.testing.assert_array_equal(d_offset[elsewhere], gradients[1][elsewhere])
        if not np.isnan(wild):
            assert not y[2, 3].any()
            assert not d_offset[2, 3].any()
            assert np.isfinite(d_x).all()
    still = np.zeros_like(offset)
    y, _ = run(put(x, (0, 0), np.inf), put(still, (0, 0), np.inf), mask)
    assert not y[0, 0].any()
    assert np.isfinite(y[3:, 3:]).all()
    y, _ = run(put(x, (2, 2), np.inf), still if not options else put(still, (2, 2), 9.0), mask)
    assert np.isfinite(y[2, 2]).all() == bool(options)


def test_offsets_serve_all_images_and_batches_may_be_empty():
    x, offset, mask = oracle.draw((3, 2, 5, 6, 4), 2)
    run = compiled(dcnv3)
    wanted = run(x, np.broadcast_to(offset[:1], offset.shape), mask)
    for shared in (offset[:1], offset[0]):
        np.testing.assert_allclose(run(x, shared, mask), wanted, rtol=1e-6, atol=1e-6)
    assert run(x[:0], offset[:0], mask[:0]).shape == (0, 2, 5, 6, 4)


def test_vmap_over_images():
    arrays = [jnp.asarray(a) for a in oracle.draw((2, 5, 6, 4), 2)]
    np.testing.assert_allclose(jax.jit(jax.vmap(dcnv3))(*arrays), compiled(dcnv3)(*arrays), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_sizes_may_be_symbolic():
    n, h, w = symbolic_shape("n, h, w")
    shapes = [jax.ShapeDtypeStruct((n, h, w, c), jnp.float32) for c in (4, 36, 18)]
    exported = jax.export.export(jax.jit(functools.partial(dcnv3, offset_scale=1.5)))(*shapes)
    arrays = oracle.draw((2, 5, 6, 4), 2)
    assert_close(exported.call(*arrays), oracle.dcnv3(*arrays, offset_scale=1.5), 1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_batch_sharded_arrays_stay_where_they_are(axis_type):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
    arrays = oracle.draw((2, 5, 6, 4), 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, jax.P("data"))) for a in arrays]

        def run(*arrays):
            return value_and_gradients(dcnv3, arrays, jnp.ones_like(arrays[0]))

        program = jax.jit(run).lower(*placed).compile()
        assert collectives(program.as_text()) == []
        assert_close(program(*placed)[0], oracle.dcnv3(*arrays), 1e-6)


X, OFFSET, MASK = jnp.ones((2, 5, 6, 4)), jnp.ones((2, 5, 6, 36)), jnp.ones((2, 5, 6, 18))


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((X[0, 0], OFFSET, MASK), {}, ValueError, r"x has shape \(6, 4\); wanted \(\*batch, H, W, C\)"),
        ((X, OFFSET[..., 1:], MASK), {}, ValueError, r"offset has shape .*35\); wanted \(\*batch, 5, 6, G \* 18\)"),
        ((X, OFFSET[:, 1:], MASK), {}, ValueError, r"offset has shape .*wanted \(\*batch, 5, 6, G"),
        ((X, OFFSET, MASK), {"remove_center": True}, ValueError, r"K \* 2 = 8 \* 2 values"),
        ((X, jnp.ones((3, 5, 6, 36)), MASK), {}, ValueError, r"offset has shape \(3, .*those of x, \(2,\)"),
        ((X, jnp.ones((2, 5, 6, 54)), MASK), {}, ValueError, "3 groups of 9 taps.*divides the 4 channels"),
        ((X, OFFSET, MASK[..., :9]), {}, ValueError, r"mask has shape .*wanted \(\*batch, 5, 6, 18\).*2, as in offset"),
        ((X, OFFSET.astype(int), MASK), {}, TypeError, "offset has dtype int32"),
        ((X, OFFSET, MASK), {"window": (3, 3, 3)}, ValueError, "window="),
        ((X, OFFSET, MASK), {"window": (2, 3), "remove_center": True}, ValueError, "remove_center=True.*wanted odd"),
        ((X, OFFSET, MASK), {"remove_center": "yes"}, TypeError, "remove_center='yes'"),
        ((X, OFFSET, MASK), {"offset_scale": "1"}, TypeError, "offset_scale='1' is a str"),
        ((X, OFFSET, MASK), {"offset_scale": float("inf")}, ValueError, "offset_scale=inf is not finite"),
        ((X, OFFSET, MASK), {"padding": "HALF"}, ValueError, "padding='HALF' is not known"),
    ],
)
def test_errors(arrays, options, error, message):
    with pytest.raises(error, match=message):
        dcnv3(*arrays, **options)
