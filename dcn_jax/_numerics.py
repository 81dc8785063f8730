"""What to compute in: the dtypes of positions, weights and sums."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def wide(*dtypes: Any) -> Any:
    """The dtype that positions, weights and sums are computed in: as wide as each of `dtypes`, and as float32."""
    # Said here, so it is no implicit promotion (a strict user allows none); 8-bit floats promote to nothing at all.
    with jax.numpy_dtype_promotion("standard"):
        wider = [dtype for dtype in dtypes if jnp.finfo(dtype).bits >= 32]
        return functools.reduce(jnp.promote_types, wider, jnp.dtype(jnp.float32))
