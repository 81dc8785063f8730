"""DCNv3, DCNv4 and MSDeformAttn to and from PyTorch and linen, by the published names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dcn_jax.linen
import dcn_jax.nnx
from dcn_jax.interop import from_linen, from_torch, to_linen, to_torch
from tests.support import attn, dcn_layers

pytestmark = pytest.mark.lenient


def dcn(name, layers=dcn_jax.nnx, **options):
    """A layer of tests/support/data/dcn.npz."""
    sizes = {"channels": dcn_layers.CHANNELS, "group": dcn_layers.GROUP}
    return functools.partial(getattr(layers, f"DCN{name[:2]}"), **sizes, **dcn_layers.OPTIONS[name], **options)


def dcn_state(name):
    """PyTorch's state of it."""
    prefix = f"{name}.state."
    files = dcn_layers.FILE
    return {key.removeprefix(prefix): files[key] for key in files.files if key.startswith(prefix)}


def attention(case, layers=dcn_jax.nnx, **options):
    return functools.partial(layers.MSDeformAttn, **attn.options(case), **options)


def attention_inputs(case):
    return *attn.stored(case, *attn.INPUTS), attn.LEVELS, attn.padding_mask(case)


# For each layer: what makes it, PyTorch's state of it, the arguments of a call, and torch's result.
LAYERS = {
    **{name: (dcn, dcn_state, lambda name: dcn_layers.stored(name)[:1], lambda name: dcn_layers.stored(name)[1]) for name in dcn_layers.OPTIONS},
    **{case: (attention, attn.state, attention_inputs, lambda case: attn.stored(case, "y")[0]) for case in attn.CASES},
}  # fmt: skip
layers = pytest.mark.parametrize("name", LAYERS)


def abstract(make, name, **options):
    """An abstract model: filling it needs no more."""
    return nnx.eval_shape(lambda: make(name, **options)(rngs=nnx.Rngs(0)))


@layers
def test_pytorch_s_weights_give_its_numbers_and_come_back(name, x64):
    make, state, inputs, y = LAYERS[name]
    layer = from_torch(abstract(make, name, param_dtype=jnp.float64), state(name))
    arrays = [np.asarray(a, np.float64) if getattr(a, "dtype", None) == np.float32 else a for a in inputs(name)]
    result = jax.jit(lambda: layer(*arrays))()
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, y(name), rtol=1e-10, atol=1e-10)
    back = to_torch(layer)
    assert back.keys() == state(name).keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, state(name)[key], err_msg=key)


@layers
def test_linen_s_parameters_are_the_same_name_for_name(name, x64):
    make, state, inputs, _ = LAYERS[name]
    params = to_linen(from_torch(abstract(make, name), state(name)))
    wanted = jax.eval_shape(lambda: make(name, dcn_jax.linen)().init(jax.random.key(0), *inputs(name)))["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    back = from_linen(abstract(make, name), params)
    for key, array in to_torch(back).items():
        np.testing.assert_array_equal(array, np.float32(state(name)[key]), err_msg=key)


def test_the_names_of_a_batch_norm_in_dcnv3():
    """It stands before the transposition, a layer norm behind."""
    norm = functools.partial(nnx.BatchNorm, use_running_average=True)
    names = to_torch(dcn("v3", norm_layer=norm)(rngs=nnx.Rngs(0))).keys()
    assert {"dw_conv.0.weight", "dw_conv.1.0.running_mean"} < names
    assert not [name for name in names if name.startswith("dw_conv.1.1")]


def test_what_rt_detr_keeps_beside_is_not_needed():
    state = attn.state("points") | {"n_points_scale": np.ones(9), "num_points_scale": np.ones(9)}
    from_torch(abstract(attention, "points"), state)
    with pytest.raises(ValueError, match=r"unexpected \(1\):\n    value_proj.n_points_scale \(9,\)"):
        from_torch(abstract(attention, "points"), state | {"value_proj.n_points_scale": np.ones(9)})


def test_a_prefix_takes_one_layer_of_a_detector():
    prefix = "model.encoder.layers.0.self_attn"
    state = {f"{prefix}.{name}": array for name, array in attn.state("points").items()}
    layer = from_torch(abstract(attention, "points"), state, prefix=prefix)
    np.testing.assert_array_equal(to_torch(layer)["value_proj.bias"], state[f"{prefix}.value_proj.bias"])
