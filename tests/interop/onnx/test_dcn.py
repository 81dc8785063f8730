"""DCNv3 and DCNv4 in ONNX, for each option of theirs."""

import functools

import pytest
from flax import nnx

from dcn_jax.nnx import DCNv3, DCNv4
from tests.support.onnx_models import SHAPE, check, checked, filled, images

pytestmark = pytest.mark.lenient

CASES = {
    "v3": (DCNv3, {}),
    "v3, every option": (
        DCNv3,
        {"kernel_size": (3, 5), "stride": (2, 1), "pad": (1, 2), "dilation": (1, 2), "offset_scale": 1.5, "remove_center": True,
         "center_feature_scale": True, "dw_kernel_size": 5, "act_layer": "SiLU"},
    ),
    "v3, an even window, a batch norm": (
        DCNv3, {"kernel_size": 2, "pad": ((1, 0), (2, 1)), "norm_layer": functools.partial(nnx.BatchNorm), "act_layer": nnx.relu},
    ),
    "v4": (DCNv4, {}),
    "v4, every option": (
        DCNv4,
        {"kernel_size": (5, 3), "stride": (1, 2), "pad": (2, 1), "dilation": (2, 1), "offset_scale": 0.7, "remove_center": True,
         "center_feature_scale": True, "dw_kernel_size": 3, "output_bias": False},
    ),
    "v4, strides, one group": (DCNv4, {"stride": 2, "group": 1, "without_pointwise": True}),
    "v4, negative padding": (DCNv4, {"pad": -1, "stride": 2, "kernel_size": 1}),
}  # fmt: skip


ALWAYS = ("v3, every option", "v4, every option")  # the others are slow together


@pytest.mark.parametrize(
    ("kind", "options"),
    [pytest.param(*CASES[name], id=name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in CASES],
)
def test_a_layer_over_open_sizes(kind, options):
    model = filled(lambda rngs: kind(**({"channels": 4, "group": 2} | options), rngs=rngs), scale=0.8)
    check(checked(model, SHAPE), model, images(2, 6, 7, 4), images(1, 9, 8, 4))


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_known_sizes(kind):
    model = filled(lambda rngs: kind(channels=4, group=2, rngs=rngs), scale=0.8)
    proto = checked(model, (None, 6, 7, 4), opset=19)
    assert "Shape" not in [node.op_type for node in proto.graph.node]
    check(proto, model, images(2, 6, 7, 4), reference=False)
