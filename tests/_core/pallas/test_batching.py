"""`jax.vmap` of kernels over an axis without members."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dcn_jax import deform_conv
from dcn_jax._core.pallas.launch import interpret


@pytest.mark.parametrize("in_axes", [(0, None, None), (0, 0, 0)], ids=["x alone", "all"])
@pytest.mark.parametrize(
    "options", [{"implementation": "pallas_gpu"}, {"implementation": "pallas_tpu", "max_offset": 1}]
)
def test_no_members(options, in_axes):
    shapes = (1, 4, 5, 8), (3, 3, 8, 2), (1, 4, 5, 18)
    arrays = [jnp.ones((0, *s) if axis == 0 else s) for s, axis in zip(shapes, in_axes, strict=True)]
    mapped = jax.vmap(functools.partial(deform_conv, **options), in_axes)
    with interpret():
        assert jax.jit(mapped)(*arrays).shape == (0, 1, 4, 5, 2)
        gradients = jax.jit(jax.grad(lambda *arrays: mapped(*arrays).sum(), (0, 1, 2)))(*arrays)
    assert [g.shape for g in gradients] == [a.shape for a in arrays]
    assert all(not jnp.any(g) for g in gradients)
