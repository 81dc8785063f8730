"""The layers for `flax.nnx`: thin shells that own the parameters, over the ops."""

from dcn_jax.nnx._deform_conv import DeformConv

__all__ = ["DeformConv"]
