"""Deformable convolution: y(p0) = Σ_n w_n · x(p0 + p_n + Δp_n) · Δm_n.

Read `call` (what a call is), `reference` (the formula in twenty lines), `xla` (the same, lean and
fast), `pallas_gpu` (fused kernels), `api` (what users call). README.md tells why it is so.
"""

from dcn_jax.ops.deform_conv.api import deform_conv, select_implementation
from dcn_jax.ops.deform_conv.call import kernel_shape

__all__ = ["deform_conv", "kernel_shape", "select_implementation"]
