"""`grid_sample` and `ms_deform_attn` of Keras's tensors: the ops, in functional models too."""

import keras
import numpy as np
import pytest

import dcn_jax
from dcn_jax.keras import grid_sample, ms_deform_attn
from tests.keras.support import normal

FEATURES, GRID = normal(2, 5, 6, 3), normal(2, 4, 4, 2)
LEVELS = ((5, 4), (3, 2))
VALUE, LOCATIONS, WEIGHTS = normal(2, 26, 2, 8), normal(2, 7, 2, 2, 3, 2), normal(2, 7, 2, 2, 3)


@pytest.mark.parametrize(
    "options",
    [{}, {"method": "cubic", "padding_mode": "edge", "align_corners": True}, {"padding_mode": ("zeros", "wrap")}],
)
def test_grid_sample(options, tmp_path):
    wanted = dcn_jax.grid_sample(FEATURES, GRID, **options)
    np.testing.assert_array_equal(grid_sample(FEATURES, GRID, **options), wanted)
    features, grid = keras.Input((None, None, 3)), keras.Input((4, 4, 2))
    model = keras.Model([features, grid], grid_sample(features, grid, **options))
    assert model.output_shape == (None, 4, 4, 3)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(each([FEATURES, GRID]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("symbolic", [False, True])
def test_a_batch_is_not_taken_for_an_axis(symbolic):
    make = keras.Input if symbolic else lambda shape: normal(2, *shape)
    with pytest.raises(ValueError, match=r"wanted features of 2 spatial axes: \(batch, height, width, channels\)"):
        grid_sample(make((7, 3)), make((5, 5, 2)))


@pytest.mark.parametrize("levels", [LEVELS, np.array(LEVELS)], ids=["tuples", "NumPy"])
@pytest.mark.parametrize("options", [{}, {"method": "discrete"}, {"points_per_level": (4, 2)}])
def test_ms_deform_attn(options, levels, tmp_path):
    shape = (2, 7, 2, 6) if "points_per_level" in options else (2, 7, 2, 2, 3)
    arrays = [VALUE, LOCATIONS.reshape(*shape, 2), WEIGHTS.reshape(shape)]
    wanted = dcn_jax.ms_deform_attn(arrays[0], LEVELS, *arrays[1:], **options)
    np.testing.assert_array_equal(ms_deform_attn(arrays[0], levels, *arrays[1:], **options), wanted)
    inputs = [keras.Input(array.shape[1:]) for array in arrays]
    model = keras.Model(inputs, ms_deform_attn(inputs[0], levels, *inputs[1:], **options))
    assert model.output_shape == (None, 7, 16)
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        np.testing.assert_allclose(each(arrays), wanted, rtol=0, atol=1e-6)


def test_errors_of_symbolic_tensors_are_the_op_s():
    with pytest.raises(ValueError, match=r"method='bilinear' is not known; .*torch's \"bilinear\" is \"linear\""):
        grid_sample(keras.Input((5, 6, 3)), keras.Input((4, 4, 2)), method="bilinear")
    with pytest.raises(ValueError, match="value has shape"):
        ms_deform_attn(keras.Input((25, 2, 8)), LEVELS, keras.Input((7, 2, 2, 3, 2)), keras.Input((7, 2, 2, 3)))
