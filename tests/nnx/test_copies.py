"""Layers and models are pickled and copied, as Flax's own are."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.models import resnet
from dcn_jax.nnx import DCNv3, DCNv4, DeformConv, MSDeformAttn, deformify

X = np.random.default_rng(0).standard_normal((2, 16, 16, 8)).astype(np.float32)
MODULES = {
    "DeformConv": lambda rngs: DeformConv(8, 4, (3, 3), padding_mode="wrap", rngs=rngs),
    "its branch": lambda rngs: DeformConv(8, 4, (3, 3), offset_conv_cls=nnx.Linear, rngs=rngs),
    "DCNv3": lambda rngs: DCNv3(8, group=2, rngs=rngs),
    "DCNv4": lambda rngs: DCNv4(8, group=1, rngs=rngs),
    "MSDeformAttn": lambda rngs: MSDeformAttn(8, 2, 1, 2, rngs=rngs),
    "deformify": lambda rngs: deformify(nnx.Sequential(nnx.Conv(8, 8, (3, 3), rngs=rngs)), lambda path, conv: True),
    "ResNet": lambda rngs: resnet.resnet18(3, deform_stages=("conv5",), rngs=rngs),
}


@pytest.mark.lenient
@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_computes_the_same(name, copied):
    module = MODULES[name](nnx.Rngs(0))
    arguments = (jnp.asarray(X[..., :3] if name == "ResNet" else X),)
    if name == "MSDeformAttn":
        flat = jnp.asarray(X.reshape(2, 256, 8))
        arguments = flat, jnp.full((2, 256, 1, 2), 0.5), flat, ((16, 16),)
    call = lambda module: module(*arguments)  # noqa: E731
    np.testing.assert_array_equal(call(copied(module)), call(module))
    assert jax.tree.structure(nnx.state(copied(module))) == jax.tree.structure(nnx.state(module))
