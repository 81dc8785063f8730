"""A whole deformable ResNet-50 with PyTorch's weights: its numbers, and its names."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import from_torch, to_torch
from dcn_jax.models.resnet import resnet50
from tests.support import interop

pytestmark = pytest.mark.lenient
DEFORM = ("conv3", "conv4", "conv5")


def abstract(dtype=jnp.float32, **options):
    return nnx.eval_shape(lambda: resnet50(param_dtype=dtype, deform_stages=DEFORM, rngs=nnx.Rngs(0), **options))


@pytest.mark.slow
def test_pytorch_s_weights_give_its_numbers(x64):
    """Those of make_interop.py, remade from their names; batch statistics far from 0 and 1 among them."""
    model = from_torch(abstract(jnp.float64), interop.state("resnet50"))
    model.eval()
    x = jnp.asarray(interop.x("resnet50"))
    y = nnx.jit(lambda model, x: model(x))(model, x)
    expected = interop.y("resnet50")
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_mmdetection_s_names_and_the_way_back():
    """A detector's backbone, without the classifier; its 13 layers have a branch each."""
    state = {
        f"backbone.{name}": v.astype(np.float32) for name, v in interop.state("resnet50").items() if "fc." not in name
    }
    branches = [name for name in state if re.fullmatch(r"backbone.layer[234]\.\d.conv2.conv_offset.weight", name)]
    assert len(branches) == 13
    assert "backbone.layer3.4.conv2.conv_offset.weight" in branches
    detector = state | {"backbone.bn1.num_batches_tracked": np.array(1), "neck.weight": np.ones(3)}
    back = to_torch(from_torch(abstract(num_classes=None), detector, prefix="backbone."))
    assert {f"backbone.{name}" for name in back} == state.keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[f"backbone.{name}"], err_msg=name, strict=True)


def test_torchvision_s_names_are_the_model_s():
    """Of a plain checkpoint, nothing but the branches is missing in the deformable model."""
    plain = {
        name: np.broadcast_to(np.float32(0), s)
        for name, s in interop.SHAPES["resnet50"].items()
        if "offset" not in name
    }
    with pytest.raises(ValueError, match="left as it was") as caught:
        from_torch(abstract(), plain)
    _, kind, *entries = str(caught.value).splitlines()
    assert kind == "  missing (26):"
    assert all(re.match(r"    layer[234]\.\d.conv2.conv_offset.(weight|bias) \(27,", entry) for entry in entries)
    assert len(entries) == 26
