"""Positions that only fill up a block read nothing: no pixel, and no gradient, is touched by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dcn_jax
from dcn_jax.ops.deform_conv.xla import schedule
from dcn_jax.ops.deform_conv.xla.blocks import Blocks

ALGORITHMS = ("all_taps", "one_tap", "two_stage", "pixel_pairs")
BORDERS = ("zeros", "edge", "wrap", "reflect", "symmetric", ("zeros", "edge"))


@pytest.fixture
def in_blocks(monkeypatch):
    """Takes an algorithm, in four blocks: of 35 positions, so that the last one is filled up."""

    def take(name):
        module, size = getattr(schedule, name), 16 if name == "pixel_pairs" else 9
        made = schedule.Algorithm(module.result, module.gradients, Blocks(4, size))
        monkeypatch.setattr(schedule, "algorithms", lambda *_, **__: (("default", made),))
        jax.clear_caches()

    yield take
    jax.clear_caches()


@pytest.mark.parametrize("border", BORDERS, ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_pixel_that_no_position_reads_harms_no_gradient(name, border, bad, in_blocks):
    """The first and the last pixel of each axis are bad, and all taps are moved to the middle of the map."""
    if name == "pixel_pairs" and border != "zeros":
        pytest.skip("a TPU reads in pairs only with zeros beyond the last axis")
    x = np.full((2, 5, 7, 4), bad, np.float32)
    x[:, 1:-1, 1:-1] = np.random.default_rng(0).standard_normal((2, 3, 5, 4))
    rows, columns = np.meshgrid(np.arange(5), np.arange(7), indexing="ij")
    offset = np.broadcast_to(np.stack([2.25 - rows, 3.25 - columns], -1), (2, 5, 7, 2)).astype(np.float32)
    mask, kernel = np.full((2, 5, 7, 1), 0.5, np.float32), np.ones((1, 1, 4, 3), np.float32)
    in_blocks(name)

    def loss(x, kernel, offset, mask):
        return jnp.sin(dcn_jax.deform_conv(x, kernel, offset, mask, padding_mode=border)).sum()

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, kernel, offset, mask):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["all_taps", "one_tap", "two_stage"])
def test_a_kernel_that_is_not_a_number_reaches_no_pixel_that_nobody_reads(name, in_blocks):
    """With borders that are clamped, where an infinite offset would read the border."""
    in_blocks(name)
    f = functools.partial(dcn_jax.deform_conv, padding_mode="edge")
    offset = np.zeros((1, 5, 7, 2), np.float32)
    offset[..., 0] = 2 - np.arange(5)[:, None]  # all read the row in the middle, and the next one by a weight of zero
    kernel = np.full((1, 1, 2, 2), np.nan, np.float32)
    gradient = jax.jit(jax.grad(lambda x: f(x, kernel, offset).sum()))(np.ones((1, 5, 7, 2), np.float32))
    assert (gradient[0, [0, 1, 4]] == 0).all()
