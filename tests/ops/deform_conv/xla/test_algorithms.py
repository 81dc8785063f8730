"""The algorithms of a TPU and a GPU, run on a CPU: pixels in pairs, two stages, and each channel alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import dcn_jax
from dcn_jax.ops.deform_conv.xla import depthwise, pixel_pairs, schedule, two_stage
from tests.support import complex_kernel
from tests.support.cases import draw
from tests.support.running import check_against_oracle

deform_conv = functools.partial(dcn_jax.deform_conv, implementation="xla")

CASES = {
    "1-D": draw((2, 20, 6), (3,), 4),
    "2-D": draw((2, 7, 9, 6), (3, 3), 4, strides=2, kernel_dilation=2),
    "3-D": draw((1, 3, 4, 5, 4), (2, 3, 2), 3, mask=False),
    "offset groups": draw((2, 5, 6, 8), (3, 3), 4, offset_groups=4),
}


@pytest.fixture(params=["tpu", "default"], autouse=True)
def platform(request, monkeypatch):
    """Takes the algorithm of a platform that is not here."""
    chosen, algorithms = [], schedule.algorithms

    def as_there(*arguments, **options):
        chosen.append(dict(algorithms(*arguments, **options))[request.param])
        return (("default", chosen[-1]),)

    monkeypatch.setattr(schedule, "algorithms", as_there)
    jax.clear_caches()  # of what was traced for a CPU, and after the test of what was traced here
    yield
    jax.clear_caches()
    there = {pixel_pairs.result} if request.param == "tpu" else {two_stage.result, depthwise.result}
    assert chosen
    assert {made.result for made in chosen} <= there


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    check_against_oracle(deform_conv, CASES[name], 1e-5)


GROUPS = {
    "more offset groups": draw((2, 5, 6, 8), (3, 3), 4, feature_group_count=2, offset_groups=4),
    "more feature groups": draw((2, 5, 6, 8), (3, 3), 8, feature_group_count=4, offset_groups=2),
    "neither divides the other": draw((1, 5, 6, 12), (2, 3), 6, feature_group_count=2, offset_groups=3),
    "depthwise": draw((2, 5, 6, 8), (3, 3), 16, feature_group_count=8, offset_groups=2, strides=2),
    "depthwise 1-D": draw((2, 20, 6), (5,), 6, feature_group_count=6, mask=False),
    "depthwise 3-D": draw((1, 3, 4, 5, 4), (2, 3, 2), 4, feature_group_count=4),
}


@pytest.mark.parametrize("platform", ["default"], indirect=True)  # a TPU takes a tap at a time here, as a CPU may
@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_convolved_apart(name):
    check_against_oracle(deform_conv, GROUPS[name], 1e-5)


@pytest.mark.parametrize("platform", ["default"], indirect=True)
@pytest.mark.parametrize("blocks", [2, 3])  # three blocks do not divide the positions: the last one is filled up
@pytest.mark.parametrize("name", ["1-D", "offset groups"])
def test_blocks_on_a_gpu(monkeypatch, name, blocks):
    monkeypatch.setattr(schedule, "blocks_on_gpu", lambda *_: blocks)
    check_against_oracle(deform_conv, CASES[name], 1e-5)


@pytest.mark.slow
def test_second_order(x64):
    case = draw((1, 3, 4, 2), (2, 2), 2, whole=0).astype(np.float64)
    f = jax.jit(lambda x, kernel, offset, mask: jnp.sin(deform_conv(x, kernel, offset, mask, **case.options)).sum())
    check_grads(f, case.arrays[:4], order=2, modes=["fwd", "rev"], rtol=1e-5)


def test_gradient_of_a_narrow_map_is_summed_wide():
    """A thousand points read one pixel: summed in bfloat16, its gradient would stop at 256."""
    x, kernel = jnp.zeros((1, 1000, 2), jnp.bfloat16), jnp.ones((1, 2, 1), jnp.bfloat16)
    offset = -jnp.arange(1000.0)[None, :, None]
    gradient = jax.grad(lambda x: deform_conv(x, kernel, offset).astype(jnp.float32).sum())(x)
    assert gradient[0, 0].tolist() == [1000, 1000]


def test_what_is_not_read_does_no_harm():
    """Infinite pixels reach only those that read them, points far away read zero, and a NaN stays where it is."""
    x = np.ones((1, 6, 6, 2), np.float32)
    x[0, 0] = x[0, -1] = x[0, :, 0] = x[0, :, -1] = np.inf
    offset = np.zeros((1, 6, 6, 2), np.float32)
    offset[0, 2, 2], offset[0, 2, 3], offset[0, 3, 2], offset[0, 3, 3] = np.inf, -1e30, (0, 100), np.nan
    y = np.asarray(jax.jit(deform_conv)(x, np.full((1, 1, 2, 1), 0.5, np.float32), offset))[0, 1:-1, 1:-1, 0]
    wanted = np.ones((4, 4))
    wanted[1, 1] = wanted[1, 2] = wanted[2, 1] = 0
    wanted[2, 2] = np.nan
    np.testing.assert_array_equal(
        y[:3, :3], wanted[:3, :3]
    )  # those beyond read an infinite neighbour by a weight of zero


@pytest.mark.parametrize("platform", ["default"], indirect=True)
@pytest.mark.parametrize("groups", [1, 2])  # two: each channel alone
def test_a_large_cotangent_of_float16_does_not_overflow(groups):
    """The gradient of a sample is beyond float16, which ends at 65,504; that of the offset, of which it is a factor, is not."""
    x = 1e-3 * np.random.default_rng(0).standard_normal((1, 4, 5, 2))
    kernel = np.full((1, 1, 2 // groups, 4), 200.0)
    offset, y_bar = np.full((1, 4, 5, 2), 0.25, np.float32), np.full((1, 4, 5, 4), 1000.0)

    def pull(dtype):
        arrays = [jnp.asarray(a, dtype) for a in (x, kernel, y_bar)]
        f = functools.partial(deform_conv, arrays[0], arrays[1], feature_group_count=groups)
        return jax.jit(lambda offset, y_bar: jax.vjp(f, offset)[1](y_bar)[0])(offset, arrays[2])

    narrow, wide = pull(jnp.float16), pull(jnp.float32)
    assert np.isfinite(narrow).all()
    np.testing.assert_allclose(narrow, wide, rtol=2e-2, atol=2e-2 * np.abs(wide).max())


@pytest.mark.parametrize(
    "platform", ["default"], indirect=True
)  # a TPU takes a tap at a time with groups, as a CPU may
@pytest.mark.parametrize("groups", [1, 2, 4], ids="{} groups".format)
def test_a_real_map_with_a_complex_kernel(groups):
    complex_kernel.check_gradients((3, 3), groups)
