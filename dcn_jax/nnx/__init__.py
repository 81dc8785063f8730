"""The layers for `flax.nnx`: thin shells that own the parameters, over the ops."""

from dcn_jax.nnx._deform_conv import DeformConv
from dcn_jax.nnx._deformify import deformify

__all__ = ["DeformConv", "deformify"]
