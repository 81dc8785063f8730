"""JAX's default mesh, whose axes are explicit: every op and layer takes what `nnx.Conv` takes there, and more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax
import dcn_jax.linen
import dcn_jax.nnx
from tests.support.running import assert_close, normal

X, SMALL = normal(4, 5, 6, 8), 0.3 * normal(4, 5, 6, 36)
KERNEL = normal(3, 3, 4, 6, seed=1)


def deform_conv(x, kernel, offset):
    return dcn_jax.deform_conv(x, kernel, offset, feature_group_count=2)


def ms_deform_attn(value, locations, weights):
    return dcn_jax.ms_deform_attn(value, ((5, 6),), locations, weights)


# The call, its arrays, and which of them have the batch.
OPS = {
    "deform_conv": (deform_conv, (X, KERNEL, SMALL), (0, 2)),
    "offsets that all images share": (deform_conv, (X, KERNEL, SMALL[:1]), (0,)),
    "dcnv3": (dcn_jax.dcnv3, (X, SMALL, normal(4, 5, 6, 18, seed=2)), (0, 1, 2)),
    "dcnv4": (functools.partial(dcn_jax.dcnv4, groups=1), (X, normal(4, 5, 6, 32, seed=2)), (0, 1)),
    "grid_sample": (dcn_jax.grid_sample, (X, 0.5 * normal(4, 9, 2)), (0, 1)),
    "affine_grid": (lambda theta: jnp.sin(dcn_jax.affine_grid(theta, (3, 4))), (normal(4, 2, 3),), (0,)),
    "ms_deform_attn": (
        ms_deform_attn,
        (X.reshape(4, 30, 2, 4), 0.5 + 0.1 * normal(4, 3, 2, 1, 2, 2), normal(4, 3, 2, 1, 2, seed=3)),
        (0, 1, 2),
    ),
    "deform_roi_pool": (
        functools.partial(dcn_jax.deform_roi_pool, output_size=(3, 4)),
        (
            X,
            jnp.array([[0, 0.3, 0.2, 4.1, 3.3], [3, 1, 1, 5, 4]] * 2, jnp.float32),
            normal(4, 3, 4, 2),
            normal(4, 3, 4),
        ),
        (1, 2, 3),
    ),
    "linear_sample": (dcn_jax.linear_sample, (X[0], 2 + normal(4, 2)), (1,)),
}
LAYERS = {
    "Conv": lambda: nnx.Conv(8, 6, (3, 3), rngs=nnx.Rngs(0)),  # what the others are held to
    "DeformConv": lambda: dcn_jax.nnx.DeformConv(8, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)),
    "DeformConv, circular": lambda: dcn_jax.nnx.DeformConv(8, 6, (3, 3), padding="CIRCULAR", rngs=nnx.Rngs(0)),
    "DCNv3": lambda: dcn_jax.nnx.DCNv3(8, group=2, rngs=nnx.Rngs(0)),
    "linen": lambda: functools.partial(
        dcn_jax.linen.DeformConv(6, (3, 3)).apply, dcn_jax.linen.DeformConv(6, (3, 3)).init(jax.random.key(0), X)
    ),
}


@pytest.fixture(params=[(4,), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["one axis", "two axes"])
def mesh(request):
    axes = ("data", "model")[: len(request.param)]
    return jax.make_mesh(request.param, axes, devices=jax.devices()[:4])


def on(mesh, arrays, batched):
    put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("data")))
    return [put(array) if i in batched else array for i, array in enumerate(arrays)]


def check(f, arrays, placed, split):
    """Compiled and not, values and gradients are those of one device; the batch stays where it is."""
    y = jax.jit(f)(*arrays)
    cotangent = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    for run in (f, jax.jit(f)):
        found = run(*placed)
        assert jax.typeof(found).sharding.spec[0] == split
        assert_close(found, y, 1e-5)
    pull = jax.jit(lambda cotangent, *arrays: jax.vjp(f, *arrays)[1](cotangent))
    # Each result is met by an operation of JAX's, which fails on a mesh of another type.
    found = [jnp.abs(gradient) for gradient in pull(cotangent, *placed)]
    for gradient, wanted in zip(found, pull(cotangent, *arrays), strict=True):
        assert_close(gradient, np.abs(wanted), 1e-5)


@pytest.mark.lenient
@pytest.mark.parametrize("name", OPS)
def test_ops_need_no_context(name, mesh):
    f, arrays, batched = OPS[name]
    check(f, arrays, on(mesh, arrays, batched), "data")


@pytest.mark.lenient
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("placed", [True, False], ids=["arrays on the mesh", "arrays of one device"])
def test_ops_within_set_mesh(name, placed, mesh):
    f, arrays, batched = OPS[name]
    wanted = jax.jit(jax.grad(lambda *arrays: jnp.sum(f(*arrays) ** 2), argnums=range(len(arrays))))(*arrays)
    with jax.set_mesh(mesh):
        there = on(mesh, arrays, batched) if placed else arrays
        gradients = jax.grad(lambda *arrays: jnp.sum(f(*arrays) ** 2), argnums=range(len(arrays)))(*there)
        found = [jnp.abs(gradient) for gradient in gradients]
    for gradient, exact in zip(found, wanted, strict=True):
        assert_close(gradient, np.abs(exact), 1e-5)


@pytest.mark.lenient
@pytest.mark.parametrize("name", LAYERS)
def test_layers_need_no_context(name, mesh):
    check(LAYERS[name](), (X,), on(mesh, (X,), (0,)), "data")


def test_arrays_that_lie_apart(mesh):
    """The offsets' batch lies over another axis than that of x: the result lies as x does."""
    x, offset = normal(4, 4, 5, 6, 4), 0.3 * normal(4, 4, 5, 6, 18)
    run = jax.jit(functools.partial(dcn_jax.deform_conv, kernel=KERNEL))
    wanted = run(x, offset=offset)
    across = jax.device_put(offset, jax.NamedSharding(mesh, jax.P(None, "data")))
    found = run(*on(mesh, (x,), (0,)), offset=across)
    assert jax.typeof(found).sharding.spec[:2] == ("data", None)
    assert_close(found, wanted, 1e-5)


@pytest.mark.lenient
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linen"])
def test_gradients_by_parameters(name, mesh):
    """JAX wants the parameters on the mesh too; `nnx.Conv` is held to the same."""

    def loss(layer, x):
        return jnp.mean(layer(x) ** 2)

    layer = LAYERS[name]()
    wanted = jax.jit(jax.grad(loss))(layer, X)
    nnx.update(layer, jax.device_put(nnx.state(layer), jax.NamedSharding(mesh, jax.P())))
    found = jax.jit(jax.grad(loss))(layer, *on(mesh, (X,), (0,)))
    for gradient, exact in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(gradient, exact, 1e-5)
