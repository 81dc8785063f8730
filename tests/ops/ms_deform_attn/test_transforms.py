"""`ms_deform_attn` under JAX's transformations, and the memory it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dcn_jax import ms_deform_attn
from tests.support.programs import collectives
from tests.support.running import assert_close

SHAPES = ((3, 4), (2, 2))


def draw(batch=(), queries=40, heads=2, dtype=np.float32, seed=0):
    """Arguments whose locations lie away from the kinks, some outside."""
    rng = np.random.default_rng(seed)
    size = np.array(SHAPES)[:, None, ::-1]
    shape = (*batch, queries, heads, 2, 2)
    pixels = rng.integers(-2, size + 1, (*shape, 2)) + rng.uniform(0.1, 0.4, (*shape, 2))
    value = rng.standard_normal((*batch, 16, heads, 2))
    return tuple(a.astype(dtype) for a in (value, (pixels + 0.5) / size, rng.random(shape)))


def attend(value, locations, weights):
    return ms_deform_attn(value, SHAPES, locations, weights)


def draw_cotangent(arguments):
    return np.float32(np.random.default_rng(1).standard_normal(jax.eval_shape(attend, *arguments).shape))


def with_gradients(cotangent, *arguments):
    y, pull = jax.vjp(attend, *arguments)
    return y, pull(cotangent)


@pytest.mark.slow
def test_second_derivatives_against_finite_differences(x64):
    """In both modes and to order 2."""
    f = jax.jit(lambda *arguments: jnp.sin(attend(*arguments)))
    check_grads(f, draw(queries=3, heads=1, dtype=np.float64), order=2, modes=["fwd", "rev"], rtol=1e-5)


def total(*arguments):
    return jnp.sum(jnp.sin(attend(*arguments)))


def test_hessian_vector_product(x64):
    """Forward over reverse, reverse over reverse, reverse over forward; in blocks, against differences of the gradient."""
    arguments, direction = draw(dtype=np.float64), draw(dtype=np.float64, seed=1)
    gradient = jax.grad(total, (0, 1, 2))

    @jax.jit
    def products(arguments):
        along = lambda *arguments: sum(map(jnp.vdot, gradient(*arguments), direction))  # noqa: E731
        slope = lambda *arguments: jax.jvp(total, arguments, direction)[1]  # noqa: E731
        backward = (jax.grad(f, (0, 1, 2))(*arguments) for f in (along, slope))
        return [jax.jvp(gradient, arguments, direction)[1], *backward]

    run = jax.jit(gradient)
    ahead, behind = (run(*[a + h * d for a, d in zip(arguments, direction, strict=True)]) for h in (1e-6, -1e-6))
    for product in products(arguments):
        for p, a, b in zip(product, ahead, behind, strict=True):
            assert_close(p, (a - b) / 2e-6, 1e-6)


def test_the_gradient_of_one_argument_alone():
    arguments = draw()
    together = jax.jit(jax.grad(total, (0, 1, 2)))(*arguments)
    for wanted in range(3):
        assert_close(jax.jit(jax.grad(total, wanted))(*arguments), together[wanted], 1e-6)


def test_vmap():
    draws = [draw(seed=seed) for seed in range(3)]
    stacked = [np.stack(arrays, axis) for arrays, axis in zip(zip(*draws, strict=True), (0, 1, -1), strict=True)]
    together, alone = jax.jit(jax.vmap(attend, (0, 1, -1)))(*stacked), jax.jit(attend)
    for i in range(3):
        assert_close(together[i], alone(*draws[i]), 1e-6)


@pytest.mark.parametrize("over", ["batch", "heads"])
def test_sharded_it_is_local(over):
    """Under plain `jit`, forward and backward, the gradient of value too."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    arguments = draw((8,) if over == "batch" else (2,), heads=2 if over == "batch" else 8)
    cotangent = draw_cotangent(arguments)
    spec = P("d") if over == "batch" else P(None, None, "d")
    arrays = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (cotangent, *arguments)]
    step = jax.jit(with_gradients).lower(*arrays).compile()
    assert collectives(step.as_text()) == []
    results = step(*arrays)
    assert results[1][0].sharding.is_equivalent_to(NamedSharding(mesh, spec), arguments[0].ndim)
    wanted = jax.jit(with_gradients)(cotangent, *arguments)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), results, wanted)


def test_shard_map_and_explicit_sharding():
    arguments = draw((8,))
    arrays = draw_cotangent(arguments), *arguments
    wanted = jax.jit(with_gradients)(*arrays)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(with_gradients, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), mapped(*arrays), wanted)
    with jax.set_mesh(jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))):
        results = jax.jit(with_gradients)(*[jax.device_put(a, P("d")) for a in arrays])
        assert results[0].sharding.spec[0] == "d"
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), results, wanted)


def test_shard_map_over_queries_with_maps_and_weights_for_all():
    """Arrays that do not vary over devices beside some that do: their gradients are summed over them."""
    value, locations, weights = draw()
    weights = np.repeat(weights[:1], 40, axis=0)
    cotangent = np.float32(np.random.default_rng(1).standard_normal((40, 4)))
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    specs = P("d"), P(), P("d"), P()
    mapped = jax.shard_map(with_gradients, mesh=mesh, in_specs=specs, out_specs=(P("d"), (P(), P("d"), P())))
    y, gradients = jax.jit(mapped)(cotangent, value, locations, weights[:5])
    wanted, (d_value, d_locations, d_weights) = jax.jit(with_gradients)(cotangent, value, locations, weights)
    d_weights = np.sum(np.reshape(d_weights, (8, 5, 2, 2, 2)), axis=0)
    expected = wanted, (d_value, d_locations, d_weights)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), (y, gradients), expected)


def test_no_queries():
    value, locations, weights = draw(queries=0)
    y, gradients = with_gradients(np.zeros((0, 4), np.float32), value, locations, weights)
    assert y.shape == (0, 4)
    np.testing.assert_array_equal(gradients[0], np.zeros_like(value))


@pytest.mark.slow
def test_symbolic_batch_and_queries():
    b, q = export.symbolic_shape("b, q")
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((b, 16, 2, 2), (b, q, 2, 2, 2, 2), (b, q, 2, 2, 2))]
    exported = export.export(jax.jit(attend))(*shapes)
    reread = export.deserialize(exported.serialize(vjp_order=1))
    for batch, queries in ((1, 1), (2, 9)):
        arguments = draw((batch,), queries)
        y, pull = jax.vjp(reread.call, *arguments)
        wanted, wanted_pull = jax.vjp(attend, *arguments)
        assert_close(y, wanted, 1e-6)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-5), pull(y), wanted_pull(wanted))


def test_symbolic_maps():
    """Sizes that a call of the exported program brings, as images of any size do."""
    h, w, q = export.symbolic_shape("h, w, q")

    def f(first, second, locations, weights):
        shapes = first.shape[:2], second.shape[:2]
        value = jnp.concatenate([m.reshape(m.shape[0] * m.shape[1], 2, 2) for m in (first, second)])
        return ms_deform_attn(value, shapes, locations, weights)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2 * h, 2 * w, 2, 2), (h, w, 2, 2), (q, 2, 2, 2, 2), (q, 2, 2, 2))]  # fmt: skip
    exported = export.export(jax.jit(f))(*shapes)
    rng = np.random.default_rng(0)
    for sizes in ((2, 4, 2, 2), (1, 2, 2, 2)), ((6, 4, 2, 2), (3, 2, 2, 2)):
        maps = [np.float32(rng.standard_normal(size)) for size in sizes]
        _, *rest = draw(queries=5)
        assert_close(exported.call(*maps, *rest), jax.jit(f)(*maps, *rest), 1e-6)


ENCODER = ((100, 152), (50, 76), (25, 38), (13, 19))


@pytest.mark.parametrize(("mode", "limit"), [("forward", 0.1), ("forward + backward", 1.5)])
def test_scratch(mode, limit):
    """Of the result's memory, for Deformable DETR's encoder: the samples of all points would take 16 times it."""
    pixels = sum(h * w for h, w in ENCODER)
    sizes = (1, pixels, 8, 32), (1, pixels, 8, 4, 4, 2), (1, pixels, 8, 4, 4)
    shapes = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    f = lambda value, *rest: ms_deform_attn(value, ENCODER, *rest)  # noqa: E731
    y = jax.eval_shape(f, *shapes)
    both = lambda y, *arguments: jax.vjp(f, *arguments)[1](y)  # noqa: E731
    program = jax.jit(f).lower(*shapes) if mode == "forward" else jax.jit(both).lower(y, *shapes)
    assert program.compile().memory_analysis().temp_size_in_bytes <= limit * 4 * y.size
