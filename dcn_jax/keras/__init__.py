"""Layers and functions for Keras 3, on its JAX backend."""

from dcn_jax.keras._deform_conv import DeformConv1D, DeformConv2D, DeformConv3D
from dcn_jax.keras._functions import grid_sample, ms_deform_attn
from dcn_jax.keras._ms_deform_attn import MSDeformAttn

__all__ = ["DeformConv1D", "DeformConv2D", "DeformConv3D", "MSDeformAttn", "grid_sample", "ms_deform_attn"]
