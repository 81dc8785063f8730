"""The layers for `flax.nnx`: thin shells that own the parameters, over the ops."""

from dcn_jax.nnx._dcn import DCNv3, DCNv4
from dcn_jax.nnx._deform_conv import DeformConv
from dcn_jax.nnx._deformify import deformify
from dcn_jax.nnx._ms_deform_attn import MSDeformAttn

__all__ = ["DCNv3", "DCNv4", "DeformConv", "MSDeformAttn", "deformify"]
