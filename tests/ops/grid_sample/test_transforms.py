"""`grid_sample` under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dcn_jax import grid_sample
from tests.support.programs import collectives
from tests.support.running import assert_close, value_and_gradients


def draw(batch=(2,), spatial=(4, 3), query=(40,), dtype=np.float32, seed=0):
    """Maps and positions away from the kinks."""
    rng = np.random.default_rng(seed)
    size = np.array(spatial[::-1])
    pixels = rng.integers(-2, size + 1, (*batch, *query, len(spatial))) + rng.uniform(0.1, 0.4, (*batch, *query, 1))
    return rng.standard_normal((*batch, *spatial, 2)).astype(dtype), ((2 * pixels + 1) / size - 1).astype(dtype)


def with_gradients(features, grid, cotangent):
    y, pull = jax.vjp(grid_sample, features, grid)
    return y, pull(cotangent)


@pytest.mark.slow
def test_derivatives_against_finite_differences(x64):
    """In both modes and to order 2, in several blocks."""
    f = jax.jit(lambda *arguments: jnp.sin(grid_sample(*arguments)))
    check_grads(f, draw((1,), (3, 2), (15,), np.float64), order=2, modes=["fwd", "rev"], rtol=1e-5)


@pytest.mark.parametrize("in_axes", [(0, 0), (None, 1), (-1, None)], ids=str)
def test_vmap(in_axes):
    draws = [draw(seed=seed) for seed in range(3)]
    stacked = [a[0] if axis is None else np.stack(a, axis) for axis, a in zip(in_axes, zip(*draws, strict=True), strict=True)]  # fmt: skip
    together, one = jax.jit(jax.vmap(grid_sample, in_axes))(*stacked), jax.jit(grid_sample)
    for i in range(3):
        alone = [draws[0 if axis is None else i][j] for j, axis in enumerate(in_axes)]
        assert_close(together[i], one(*alone), 1e-6)


def test_batch_sharded_it_is_local():
    """Forward and backward, under plain `jit`."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays = (*draw((8,)), np.float32(np.random.default_rng(1).standard_normal((8, 40, 2))))
    sharded = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in arrays]
    step = jax.jit(with_gradients).lower(*sharded).compile()
    assert collectives(step.as_text()) == []
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), step(*sharded), jax.jit(with_gradients)(*arrays))


def test_shard_map_and_explicit_sharding():
    arrays = (*draw((8,)), np.float32(np.random.default_rng(1).standard_normal((8, 40, 2))))
    wanted = jax.jit(with_gradients)(*arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(with_gradients, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), mapped(*arrays), wanted)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        results = jax.jit(with_gradients)(*[jax.device_put(a, P("data")) for a in arrays])
        assert results[0].sharding.spec[0] == "data"
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), results, wanted)


@pytest.mark.parametrize("method", ["linear", "nearest"])
def test_symbolic_sizes(method):
    """One exported program, with its gradients, for every batch, map and number of queries."""
    b, h, w, q = export.symbolic_shape("b, h, w, q")
    f = functools.partial(grid_sample, method=method, padding_mode="reflect")
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, h, w, 2), (b, q, 2))]
    exported = export.export(jax.jit(f))(*shapes)
    reread = export.deserialize(exported.serialize(vjp_order=1))
    for batch, spatial, query in (((1,), (1, 3), (1,)), ((2,), (4, 5), (9,))):
        arguments = draw(batch, spatial, query)
        cotangent = np.float32(np.random.default_rng(1).standard_normal((*batch, *query, 2)))
        results = (jax.jit(functools.partial(value_and_gradients, g))(arguments, cotangent) for g in (reread.call, f))
        (y, gradients), (wanted, wanted_gradients) = results
        assert_close(y, wanted, 1e-6)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-5), gradients, wanted_gradients)


@pytest.mark.parametrize(("mode", "limit"), [("forward", 0.1), ("forward + backward", 1.5)])
def test_scratch(mode, limit):
    """Of the result's memory, for 256² positions of 64 channels: the samples of all corners would take four times it."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 256, 256, 64), (1, 256, 256, 2))]
    y = jax.eval_shape(grid_sample, *shapes)
    f, arguments = (grid_sample, shapes) if mode == "forward" else (with_gradients, [*shapes, y])
    scratch = jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    assert scratch <= limit * 4 * y.size
