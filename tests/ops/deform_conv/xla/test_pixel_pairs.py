"""What a TPU's step is made of, where results in float32 are too coarse to tell."""

import jax
import numpy as np

from dcn_jax.ops.deform_conv.xla import pixel_pairs
from tests.support.running import normal


def test_weights_spread_by_a_product_lose_no_bit():
    """Three bfloat16 hold all of a float32: each weight comes back as it was."""
    first, second = normal(3, 40), normal(3, 40, seed=1)
    spread = jax.jit(pixel_pairs._spread, static_argnums=2)(first, second, 6)
    np.testing.assert_array_equal(spread, np.repeat(np.stack([first, second], axis=-1), 3, axis=-1))
