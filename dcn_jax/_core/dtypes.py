"""The dtypes of positions, weights and sums, and the precision of matrix products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def wide(*dtypes: Any) -> Any:
    """The dtype that positions, weights and sums are computed in: as wide as each of `dtypes`, and as float32."""
    # `promote_types` fails for users of strict promotion, hence the context, and for 8-bit floats, hence the filter.
    with jax.numpy_dtype_promotion("standard"):
        wider = [dtype for dtype in dtypes if jnp.finfo(dtype).bits >= 32]
        return functools.reduce(jnp.promote_types, wider, jnp.dtype(jnp.float32))


def asked_precision(precision: Any) -> Any:
    """How `lax` reads `precision` for a float32 product: None, a pair of `lax.Precision`, or a `DotAlgorithmPreset`.

    jax_default_matmul_precision counts too.
    """
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    (dot,) = jax.make_jaxpr(functools.partial(lax.dot, precision=precision))(one, one).eqns
    return dot.params["precision"]
