"""Deformable convolution (DCNv1 and DCNv2) for JAX and Flax.

The op is `deform_conv`, its family `grid_sample` (with `affine_grid`), `ms_deform_attn`, `dcnv3`,
`dcnv4`, `roi_align` and `deform_roi_pool`; layers are in `dcn_jax.linen`, `dcn_jax.nnx` and
`dcn_jax.keras`; `dcn_jax.sharding` takes maps that are split over devices. Read the package in the
order of the mathematics: `geometry`, `sampling`, `ops/deform_conv`, then the layers.
"""

import importlib
from typing import Any

from dcn_jax.geometry import sampling_points
from dcn_jax.ops.affine_grid import affine_grid
from dcn_jax.ops.dcnv3 import dcnv3
from dcn_jax.ops.dcnv4 import dcnv4
from dcn_jax.ops.deform_conv import deform_conv, select_implementation
from dcn_jax.ops.grid_sample import grid_sample
from dcn_jax.ops.ms_deform_attn import ms_deform_attn
from dcn_jax.ops.roi_pool import deform_roi_pool, roi_align
from dcn_jax.sampling import linear_sample

__version__ = "0.1.0"
__all__ = [
    "affine_grid",
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

# They load when they are asked for: most need more than JAX and NumPy.
_MODULES = ("interop", "keras", "linen", "models", "nnx", "optim", "sharding", "viz")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"dcn_jax.{name}")
    raise AttributeError(f"module 'dcn_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
