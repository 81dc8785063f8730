"""The layers of RoI pooling, linen and nnx alike: mmcv's start, names and orders; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax import roi_align
from dcn_jax.interop import from_torch, to_linen, to_torch
from tests.support import roi_oracle
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient
NAMES = ("DeformRoIPool", "ModulatedDeformRoIPool")
OPTIONS = {"deform_fc_channels": 5, "spatial_scale": 0.5, "gamma": 0.4}
X, ROIS, *_ = roi_oracle.draw(dtype=np.float32)
ROIS = ROIS * np.float32([1, 2, 2, 2, 2])
SHAPES = {
    "offset_fc.0": (5, 36),
    "offset_fc.2": (5, 5),
    "offset_fc.4": (24, 5),
    "mask_fc.0": (5, 36),
    "mask_fc.2": (12, 5),
}


def make(name, **options):
    return getattr(dcn_jax.nnx, name)((3, 4), 3, rngs=nnx.Rngs(0), **(OPTIONS | options))


def state_of(name):
    """Random weights by mmcv's names."""
    rng, state = np.random.default_rng(0), {}
    for module, shape in SHAPES.items():
        if module.startswith("offset") or name.startswith("Modulated"):
            state[f"{module}.weight"] = rng.normal(0, 0.4, shape).astype(np.float32)
            state[f"{module}.bias"] = rng.normal(0, 0.4, shape[0]).astype(np.float32)
    return state


def mmcvs(name, state):
    """What mmcv's layer computes of these weights, with channels last."""
    options = {"output_size": (3, 4), "spatial_scale": 0.5, "gamma": 0.4}
    plain, _ = roi_oracle.pool(X, ROIS, **options)
    flat = np.moveaxis(plain, -1, 1).reshape(len(ROIS), -1)

    def dense(number, x):
        return x @ np.float64(state[f"{number}.weight"]).T + state[f"{number}.bias"]

    hidden = np.maximum(dense("offset_fc.2", np.maximum(dense("offset_fc.0", flat), 0)), 0)
    shift = dense("offset_fc.4", hidden).reshape(-1, 2, 3, 4)  # x, then y
    offset, mask = np.stack([shift[:, 1], shift[:, 0]], axis=-1), np.ones((len(ROIS), 3, 4))
    if name.startswith("Modulated"):
        mask = 1 / (1 + np.exp(-dense("mask_fc.2", np.maximum(dense("mask_fc.0", flat), 0)))).reshape(mask.shape)
    return roi_oracle.pool(X, ROIS, offset, mask, **options)[0], offset, mask


@pytest.mark.parametrize("name", NAMES)
def test_mmcvs_weights_give_mmcvs_result(name):
    """In nnx, and in linen with the same parameters; what is sown is what was used."""
    state = state_of(name)
    layer = from_torch(make(name), state)
    wanted, offset, mask = mmcvs(name, state)
    found, seen = jax.jit(lambda layer: nnx.capture(layer, nnx.Intermediate)(X, ROIS))(layer)
    assert_close(found, wanted, 1e-5)
    linen = getattr(dcn_jax.linen, name)((3, 4), **OPTIONS)
    params = {"params": to_linen(layer)}
    again, sown = jax.jit(lambda params: linen.apply(params, X, ROIS, mutable=["intermediates"]))(params)
    assert_close(again, wanted, 1e-5)
    sown = sown["intermediates"]
    assert_close(sown["offset"][0], offset, 1e-5)
    assert_close(seen["offset"][0], offset, 1e-5)
    assert ("mask" in sown) == ("mask" in seen) == name.startswith("Modulated")
    if "mask" in sown:
        assert_close(sown["mask"][0], mask, 1e-5)
    back = to_torch(layer)
    assert set(back) == set(state)
    for key, array in state.items():
        np.testing.assert_array_equal(back[key], array)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_layer_is_roi_align(name):
    """Or half of it; with the same parameters in linen and nnx."""
    layer, share = make(name), 0.5 if name.startswith("Modulated") else 1
    plain = roi_align(X, ROIS, output_size=(3, 4), spatial_scale=0.5)
    assert_close(layer(X, ROIS), share * plain, 1e-6)
    params = jax.eval_shape(getattr(dcn_jax.linen, name)((3, 4), **OPTIONS).init, jax.random.key(0), X, ROIS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, to_linen(layer))
    kernel = np.asarray(layer.offset_fc.layers[0].kernel[...])
    assert kernel.std() == pytest.approx(36**-0.5, rel=0.3)
    assert not layer.offset_fc.layers[4].kernel[...].any()


def test_half_precision():
    """Offsets are computed in float32."""
    layer = make("ModulatedDeformRoIPool", dtype=jnp.bfloat16)
    y, seen = nnx.capture(layer, nnx.Intermediate)(X, ROIS)
    assert (y.dtype, seen["offset"][0].dtype, seen["mask"][0].dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_errors(framework):
    def call(x=X, size=(3, 4), **options):
        if framework == "nnx":
            return dcn_jax.nnx.DeformRoIPool(size, 3, rngs=nnx.Rngs(0), **options)(x, ROIS)
        return dcn_jax.linen.DeformRoIPool(size, **options).init(jax.random.key(0), x, ROIS)

    with pytest.raises(ValueError, match="sampling_ratio=0 asks for a number of samples"):
        call(sampling_ratio=0)
    with pytest.raises(ValueError, match="output_size=0 is too small"):
        call(size=0)
    with pytest.raises(TypeError, match=r"deform_fc_channels=2\.5 is a float; wanted an int"):
        call(deform_fc_channels=2.5)
    with pytest.raises(ValueError, match=r"x has shape \(6, 7, 3\); wanted \(batch, H, W, C\)"):
        call(x=X[0])
    if framework == "nnx":
        with pytest.raises(
            ValueError, match=r"wanted \(batch, H, W, 3\), channels last: the layer has output_channels=3"
        ):
            call(x=X[..., :2])
