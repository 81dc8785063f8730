"""The layers for `flax.linen`: thin shells that own the parameters, over the ops."""

from dcn_jax.linen._deform_conv import DeformConv

__all__ = ["DeformConv"]
