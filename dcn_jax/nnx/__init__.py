"""The layers for `flax.nnx`. They make the parameters; the ops do the arithmetic."""

from dcn_jax.nnx._dcn import DCNv3, DCNv4
from dcn_jax.nnx._deform_conv import DeformConv
from dcn_jax.nnx._deformify import deformify
from dcn_jax.nnx._ms_deform_attn import MSDeformAttn
from dcn_jax.nnx._roi_pool import DeformRoIPool, ModulatedDeformRoIPool

__all__ = ["DCNv3", "DCNv4", "DeformConv", "DeformRoIPool", "MSDeformAttn", "ModulatedDeformRoIPool", "deformify"]
