"""Deformable convolution: y(p0) = Σ_n w_n · x(p0 + p_n + Δp_n) · Δm_n.

Read `reference` (the formula in twenty lines), `call` (a checked call), `xla/` (the op in `jax.numpy`),
`pallas_gpu/` and `pallas_tpu/` (kernels), `api` (what users call). README.md explains the design, JOURNAL.md
holds figures and what was tried.
"""

from dcn_jax.ops.deform_conv.api import deform_conv, select_implementation
from dcn_jax.ops.deform_conv.call import kernel_shape

__all__ = ["deform_conv", "kernel_shape", "select_implementation"]
