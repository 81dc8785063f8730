"""Deformable convolution (DCNv1 and DCNv2) for JAX and Flax.

The op is `deform_conv`, its family `grid_sample`, `ms_deform_attn`, `dcnv3`, `dcnv4`, `roi_align`
and `deform_roi_pool`; layers are in `dcn_jax.linen` and `dcn_jax.nnx`. Read the package in the
order of the mathematics: `geometry`, `sampling`, `ops/deform_conv`, then the layers.
"""

from dcn_jax.geometry import sampling_points
from dcn_jax.ops.dcnv3 import dcnv3
from dcn_jax.ops.dcnv4 import dcnv4
from dcn_jax.ops.deform_conv import deform_conv, select_implementation
from dcn_jax.ops.grid_sample import grid_sample
from dcn_jax.ops.ms_deform_attn import ms_deform_attn
from dcn_jax.ops.roi_pool import deform_roi_pool, roi_align
from dcn_jax.sampling import linear_sample

__version__ = "0.1.0"
__all__ = [
    "dcnv3",
    "dcnv4",
    "deform_conv",
    "deform_roi_pool",
    "grid_sample",
    "linear_sample",
    "ms_deform_attn",
    "roi_align",
    "sampling_points",
    "select_implementation",
]
