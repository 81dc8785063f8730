"""The table of converters: what adds the nodes of each layer and function that `to_onnx` knows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import dcn_jax.nnx
from dcn_jax._layers.dcn import activation
from dcn_jax.interop._onnx import dcn, deform_conv, functions, layers, models, ms_deform_attn, sampling
from dcn_jax.interop._onnx.graph import Graph, Value
from dcn_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from dcn_jax.nnx._dcn import DepthwiseBlock
from dcn_jax.ops.grid_sample import grid_sample
from dcn_jax.ops.ms_deform_attn import ms_deform_attn as attention


def _exact_gelu(graph: Graph, x: Value) -> Value:
    """DCNv3's "GELU"."""
    return functions.gelu(graph, x, approximate=False)


CONVERTERS: dict[Any, Callable[..., Value]] = {
    # layers of this library
    dcn_jax.nnx.DeformConv: deform_conv.deform_conv,
    dcn_jax.nnx.MSDeformAttn: ms_deform_attn.layer,
    dcn_jax.nnx.DCNv3: dcn.dcnv3,
    dcn_jax.nnx.DCNv4: dcn.dcnv4,
    DepthwiseBlock: dcn.depthwise_block,
    ResNet: models.resnet,
    BasicBlock: models.basic_block,
    Bottleneck: models.bottleneck,
    # of Flax
    nnx.Conv: layers.conv,
    nnx.ConvTranspose: layers.conv_transpose,
    nnx.Linear: layers.linear,
    nnx.Embed: layers.embed,
    nnx.BatchNorm: layers.batch_norm,
    nnx.LayerNorm: layers.layer_norm,
    nnx.GroupNorm: layers.group_norm,
    nnx.Dropout: layers.dropout,
    nnx.Sequential: layers.sequential,
    # functions
    grid_sample: sampling.grid_sample,
    attention: ms_deform_attn.op,
    activation("GELU"): _exact_gelu,
    jax.nn.relu: functions.operator("Relu"),
    jax.nn.relu6: functions.relu6,
    jax.nn.leaky_relu: functions.leaky_relu,
    jax.nn.sigmoid: functions.operator("Sigmoid"),
    jax.nn.silu: functions.silu,
    jax.nn.gelu: functions.gelu,
    jax.nn.softmax: functions.softmax,
    jnp.tanh: functions.operator("Tanh"),
    jnp.mean: functions.mean,
    nnx.max_pool: functions.max_pool,
    nnx.avg_pool: functions.avg_pool,
}
