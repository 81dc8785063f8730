"""`benchmarks/keras_models.py`, on a small detector: the same numbers, and a figure for every cell."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import keras_models
from tests.keras.support import normal

# What zeromodels' models warn of when they are made.
WARNINGS = "ignore:Layer .* looks like it has unbuilt state", "ignore:.build.*was called on layer"


def test_the_core_is_theirs():
    from zeromodels.models.rt_detr_v2 import rt_detr_v2_layers as layers

    value, locations, weights = normal(2, 2, 8, 30), normal(2, 5, 2, 2, 3, 2, seed=1), normal(2, 5, 2, 6, seed=2)
    arguments = jnp.asarray(value), [(4, 6), (2, 3)], jnp.asarray(locations), jnp.asarray(weights)
    wanted, actual = layers.ms_deform_attn_core(*arguments), keras_models.our_core("linear")(*arguments)
    assert keras_models.relative(actual, wanted) < 1e-5


def test_the_discrete_core_reads_single_pixels():
    """Pixel i at i / size, where theirs reads it at its centre, (i + 0.5) / size."""
    from zeromodels.models.rt_detr_v2 import rt_detr_v2_layers as layers

    value, weights = jnp.asarray(normal(2, 2, 8, 24)), jnp.asarray(normal(2, 5, 2, 3))
    pixels = np.random.default_rng(0).integers(0, (6, 4), (2, 5, 2, 1, 3, 2)).astype(np.float32)  # (x, y)
    centres, corners = (jnp.asarray((pixels + shift) / np.array([6, 4], np.float32)) for shift in (0.5, 0.0))
    wanted = layers.ms_deform_attn_core(value, [(4, 6)], centres, weights)
    actual = keras_models.our_core("discrete")(value, [(4, 6)], corners, weights)
    assert keras_models.relative(actual, wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNINGS)
def test_a_small_detector():
    from zeromodels.models.rt_detr_v2 import RTDetrV2Config, RTDETRV2Detect, rt_detr_v2_layers

    model = RTDETRV2Detect(RTDetrV2Config(image_size=64, num_queries=20, decoder_num_layers=2))
    before, x = rt_detr_v2_layers.ms_deform_attn_core, jnp.asarray(normal(1, 64, 64, 3))
    assert max(keras_models.differences(rt_detr_v2_layers, model, x)) < 1e-4
    found = keras_models.costs(rt_detr_v2_layers, model, x, ("linear",), repeats=1)
    assert rt_detr_v2_layers.ms_deform_attn_core is before
    assert list(found) == ["forward", "step"]
    for costs in found.values():
        assert list(costs) == ["zeromodels", "dcn_jax, linear"]
        assert all(value > 0 for cost in costs.values() for value in cost)
