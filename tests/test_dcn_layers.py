"""DCNv3 and DCNv4, linen and nnx alike: torch's numbers, their start, and the sizes that the published ones do not take."""

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support import dcn_layers
from tests.support import dcn_oracle as oracle
from tests.support.running import assert_close, normal

pytestmark = pytest.mark.lenient
frameworks = pytest.mark.parametrize("framework", dcn_layers.FRAMEWORKS)
kinds = pytest.mark.parametrize("kind", ["DCNv3", "DCNv4"])


def make(framework, kind, **options):
    return dcn_layers.FRAMEWORKS[framework](kind, **options)


def filled(init, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), jax.eval_shape(init))


@frameworks
@pytest.mark.parametrize("name", dcn_layers.OPTIONS)
def test_torch_computes_the_same(framework, name):
    init, apply = make(framework, f"DCN{name[:2]}", **dcn_layers.OPTIONS[name])
    x, wanted = dcn_layers.stored(name)
    params = dcn_layers.params(name)
    assert jax.tree.map(jnp.shape, jax.eval_shape(init)) == jax.tree.map(jnp.shape, params)
    assert_close(jax.jit(apply)(params, x), wanted, 2e-6)


@frameworks
@kinds
def test_a_fresh_layer(framework, kind):
    """Offsets and weights of zeros, projections of Xavier's, and a depthwise convolution as torch begins it."""
    init, _ = make(framework, kind, channels=64, dw_kernel_size=5, center_feature_scale=True)
    params = jax.jit(init)()
    zeros = {"offset", "mask", "offset_mask", "center_feature_scale_proj_weight", "center_feature_scale_proj_bias"}
    for name in zeros & params.keys():
        assert not any(p.any() for p in jax.tree.leaves(params[name]))
    bound = (6 / 128) ** 0.5
    for name in {"input_proj", "value_proj", "output_proj"} & params.keys():
        assert 0.95 * bound < jnp.abs(params[name]["kernel"]).max() <= bound
        assert not params[name]["bias"].any()
    for p in jax.tree.leaves(params["dw_conv"]["conv"] if kind == "DCNv3" else params["offset_mask_dw"]):
        assert 0.9 / 5 < jnp.abs(p).max() <= 1 / 5


@pytest.mark.slow
@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "kernel_size": 5, "pad": 1, "dw_kernel_size": 3},
        {
            "kernel_size": (2, 3),
            "pad": ((2, 0), (1, 3)),
            "dilation": (2, 1),
            "stride": (1, 2),
            "dw_kernel_size": (4, 1),
        },
    ],
)
def test_any_geometry(kind, options):
    """linen equals nnx, in values and gradients, where the size of the map changes."""
    options = options | {"center_feature_scale": True, "offset_scale": 1.5}
    (init, linen), (_, nnx_layer) = (make(f, kind, **options) for f in dcn_layers.FRAMEWORKS)
    params, x = filled(init), normal(2, 7, 8, 8, seed=1)

    def loss(apply, params, x):
        y = apply(params, x)
        return (y**2).sum(), y

    grads = [jax.jit(jax.grad(functools.partial(loss, a), (0, 1), has_aux=True))(params, x) for a in (linen, nnx_layer)]
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), *grads)


@pytest.mark.slow
@frameworks
@kinds
def test_a_strided_layer_is_the_whole_one_at_every_second_place(framework, kind):
    """Offsets, weights and what is mixed in are taken where the op's outputs stand."""
    options = {"dw_kernel_size": 3, "center_feature_scale": True}
    (init, whole), (_, strided) = (make(framework, kind, stride=s, **options) for s in (1, 2))
    params, x = filled(init), normal(2, 7, 8, 8, seed=1)
    assert_close(jax.jit(strided)(params, x), jax.jit(whole)(params, x)[:, ::2, ::2], 1e-5)
    (init, whole), (_, padded) = (make(framework, kind, pad=p, **options) for p in (1, 2))
    assert_close(jax.jit(padded)(params, x)[:, 1:-1, 1:-1], jax.jit(whole)(params, x), 1e-5)


@frameworks
def test_a_fresh_dcnv3_is_a_mean_over_the_window(framework):
    init, apply = make(framework, "DCNv3")
    params, x = jax.jit(init)(), np.float32(np.random.default_rng(0).standard_normal((5, 6, 8)))
    v = np.float64(x) @ np.float64(params["input_proj"]["kernel"])
    mean = oracle.dcnv3(v, np.zeros((5, 6, 36)), np.full((5, 6, 18), 1 / 9))
    assert_close(jax.jit(apply)(params, x), mean @ np.float64(params["output_proj"]["kernel"]), 1e-5)


@frameworks
@kinds
def test_half_precision_keeps_offsets_wide(framework, kind):
    init, apply = make(framework, kind, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), filled(init))
    x = normal(5, 6, 8, seed=1).astype(jnp.bfloat16)
    assert jax.eval_shape(apply, params, x).dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(apply)(params, x))
    features = "36" if kind == "DCNv3" else "56"
    assert f"f32[5,6,{features}] = dot_general" in program


@frameworks
@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("DCNv3", {"group": 3}, ValueError, "group=3 must divide channels=8"),
        ("DCNv4", {"group": "2"}, TypeError, "group='2' is a str"),
        ("DCNv3", {"act_layer": "Swish"}, ValueError, "act_layer='Swish' is not known; wanted one of"),
        ("DCNv3", {"norm_layer": "BN"}, ValueError, "norm_layer='BN' is not known.*BatchNorm"),
        ("DCNv4", {"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size=\(3, 3, 3\) has 3 entries"),
        ("DCNv3", {"kernel_size": 4, "remove_center": True}, ValueError, "remove_center=True.*wanted odd sizes"),
    ],
)
def test_errors(framework, kind, options, error, message):
    init, apply = make(framework, kind, **options)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: apply(init(), jnp.ones((9, 9, 8))))


@frameworks
@kinds
def test_inputs_that_do_not_fit(framework, kind):
    init, apply = make(framework, kind)
    params = jax.eval_shape(init)
    with pytest.raises(ValueError, match=r"inputs has shape \(5, 6, 7\); wanted \(\*batch, H, W, 8\)"):
        jax.eval_shape(apply, params, jnp.ones((5, 6, 7)))


def test_a_norm_and_an_activation_of_one_s_own():
    """linen's is called with its name, nnx's with the channels."""
    norms = {
        "linen": functools.partial(flax.linen.RMSNorm, use_scale=False),
        "nnx": functools.partial(nnx.RMSNorm, use_scale=False),
    }
    layers = [make(f, "DCNv3", norm_layer=norms[f], act_layer=jnp.tanh) for f in norms]
    params, x = filled(layers[0][0]), normal(5, 6, 8, seed=1)
    assert_close(*(jax.jit(apply)(params, x) for _, apply in layers), 1e-5)
