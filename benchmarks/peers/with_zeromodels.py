"""zeromodels' attention, written in Keras and compiled by JAX, as its RT-DETRv2 calls it: with or without gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from zeromodels.models.rt_detr_v2.rt_detr_v2_layers import ms_deform_attn_core

begun: list = []  # results of the last call: a device computes calls in their order


def ms_deform_attn(value, locations, weights, spatial_shapes):
    """The function of zeromodels; its layer brings a value into the order (N, M, D, S), too."""
    flat = weights.reshape(*weights.shape[:3], -1)  # (N, Q, M, L P)
    return ms_deform_attn_core(jnp.transpose(value, (0, 2, 3, 1)), spatial_shapes, locations, flat)


def prepare(arrays, *, options, mode, dtype, device, copies, **_):
    """`call(i)` of the i-th copy of the inputs, and what memory it takes; with gradients, the first array is the result's."""
    spatial_shapes = [tuple(size) for size in options["spatial_shapes"]]

    def forward(*arguments):
        return [ms_deform_attn(*arguments, spatial_shapes)]

    def forward_backward(cotangent, *arguments):
        (y,), vjp = jax.vjp(forward, *arguments)
        return [y, *vjp([cotangent])]

    place = jax.devices(device)[0]
    inputs = [[jax.device_put(array.astype(dtype), place) for array in arrays] for _ in range(copies)]
    compiled = jax.jit(forward if mode == "forward" else forward_backward).lower(*inputs[0]).compile()
    memory = compiled.memory_analysis()
    scratch = memory.temp_size_in_bytes
    peak = scratch + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def call(copy):
        begun[:] = compiled(*inputs[copy])
        return begun[:]

    return call, {"scratch_bytes": scratch, "peak_bytes": peak, "timed": "launches" if device != "cpu" else None}


def synchronize():
    """Wait for what was begun."""
    jax.block_until_ready(begun)


def to_numpy(result):
    """The result as an array of float32."""
    return np.asarray(result, np.float32)
