"""The layers for `flax.linen`. They make the parameters; the ops do the arithmetic."""

from dcn_jax.linen._dcn import DCNv3, DCNv4
from dcn_jax.linen._deform_conv import DeformConv
from dcn_jax.linen._ms_deform_attn import MSDeformAttn
from dcn_jax.linen._roi_pool import DeformRoIPool, ModulatedDeformRoIPool

__all__ = ["DCNv3", "DCNv4", "DeformConv", "DeformRoIPool", "MSDeformAttn", "ModulatedDeformRoIPool"]
