"""`MSDeformAttn` for Keras: the numbers of nnx's layer, which has its own tests, and all that a Keras layer does."""

import jax.numpy as jnp
import keras
import numpy as np
import pytest

import dcn_jax
from dcn_jax.interop import from_keras
from dcn_jax.keras import MSDeformAttn
from tests.keras.support import fill, normal

LEVELS = ((5, 4), (3, 2))
SIZES = {"embed_dim": 16, "num_heads": 4, "num_levels": 2, "num_points": 3}
PIXELS = sum(height * width for height, width in LEVELS)


def arrays(coordinates=4, batch=2):
    rng = np.random.default_rng(0)
    reference = rng.uniform(size=(batch, 7, 2, coordinates)).astype("float32")
    return normal(batch, 7, 16), reference, normal(batch, PIXELS, 16)


def make(**options):
    layer = MSDeformAttn(**{**SIZES, **options})
    layer.build((None, None, 16))
    return fill(layer)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("options", [{}, {"num_points": (3, 2)}, {"method": "discrete"}])
def test_equals_the_op_and_nnx(coordinates, options):
    layer, (query, reference, value) = make(**options), arrays(coordinates)
    y = layer(query, reference, value, spatial_shapes=LEVELS)
    locations, weights = layer.locations_and_weights(query, reference, value, spatial_shapes=LEVELS)
    assert np.allclose(weights.reshape(2, 7, 4, -1).sum(-1), 1)
    projected = (value @ layer.value_proj.kernel + layer.value_proj.bias).reshape(2, PIXELS, 4, 4)
    per_level = options.get("num_points", None)
    summed = dcn_jax.ms_deform_attn(
        projected, LEVELS, locations, weights, points_per_level=per_level, method=layer.method
    )
    wanted = summed @ layer.output_proj.kernel + layer.output_proj.bias
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_array_equal(y, from_keras(layer)(query, reference, value, LEVELS))
    np.testing.assert_array_equal(layer(query, reference, value, [list(size) for size in LEVELS]), y)


def test_padding_counts_as_zero():
    layer, (query, reference, value) = make(), arrays()
    padding = np.random.default_rng(1).random((2, PIXELS)) < 0.3
    layer.value_proj.bias.assign(np.zeros(16))
    blanked = layer(query, reference, np.where(padding[..., None], 0, value), spatial_shapes=LEVELS)
    y = layer(query, reference, value, spatial_shapes=LEVELS, padding_mask=padding)
    np.testing.assert_allclose(y, blanked, rtol=0, atol=1e-5)


def test_a_new_layer_looks_in_the_published_directions():
    layer = MSDeformAttn(**SIZES)
    layer.build((None, None, 16))
    bias = layer.sampling_offsets.bias.numpy().reshape(4, 2, 3, 2)  # (M, L, P, (x, y))
    for point in range(3):
        directions = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]) * (point + 1)
        np.testing.assert_allclose(bias[:, :, point], np.repeat(directions[:, None], 2, axis=1), atol=1e-6)


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_locations_of_mixed_policies_are_float32(policy, name):
    exact = make()
    policy(name)
    layer, inputs = make(), arrays()
    locations, weights = layer.locations_and_weights(*inputs, spatial_shapes=LEVELS)
    assert locations.dtype == weights.dtype == jnp.float32
    wanted, _ = exact.locations_and_weights(*inputs, spatial_shapes=LEVELS)
    np.testing.assert_allclose(locations, wanted, rtol=0, atol=1e-5)
    y = layer(*inputs, spatial_shapes=LEVELS)
    assert y.dtype == layer.compute_dtype
    np.testing.assert_array_equal(y, from_keras(layer)(*inputs, LEVELS))
    wanted = exact(*inputs, spatial_shapes=LEVELS)
    np.testing.assert_allclose(np.asarray(y, np.float32), wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


def functional(**options):
    query, reference, value = keras.Input((None, 16)), keras.Input((None, 2, 4)), keras.Input((PIXELS, 16))
    layer = MSDeformAttn(**{**SIZES, **options})
    return keras.Model([query, reference, value], layer(query, reference, value, LEVELS)), layer


def test_trained_saved_and_loaded(tmp_path):
    model, layer = functional(
        num_points=(3, 2), kernel_initializer="he_normal", offset_bias_initializer="random_normal"
    )
    assert model.output_shape == (None, None, 16)
    inputs = list(arrays())
    model.compile(keras.optimizers.Adam(0.01), "mse")
    before = [weight.numpy() for weight in layer.weights]
    losses = model.fit(inputs, normal(2, 7, 16, seed=1), epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert all((weight.numpy() != old).any() for weight, old in zip(layer.weights, before, strict=True))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    assert layer.from_config(layer.get_config()).get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (PIXELS + 1, 16)}, rf"value has shape .*{PIXELS + 1}, 16\); wanted \(\*batch, {PIXELS}, 16\)"),
        ({"query": (7, 15)}, r"query has shape .*; wanted \(\*batch, Q, 16\)"),
        ({"reference": (7, 2, 3)}, r"reference_points has shape .*2, 3\)"),
        ({"spatial_shapes": (LEVELS[0],)}, "spatial_shapes=.* has 1 levels"),
        ({"spatial_shapes": None}, r"spatial_shapes is missing; give the sizes of the maps: "),
    ],
)
@pytest.mark.parametrize("symbolic", [False, True], ids=["arrays", "functional"])
def test_what_does_not_fit(change, message, symbolic):
    shapes = {"query": (7, 16), "reference": (7, 2, 4), "value": (PIXELS, 16)}
    given = {"spatial_shapes": LEVELS, **shapes, **change}
    inputs = [keras.Input(given[name]) if symbolic else normal(2, *given[name]) for name in shapes]
    with pytest.raises(ValueError, match=message):
        MSDeformAttn(**SIZES)(*inputs, spatial_shapes=given["spatial_shapes"])


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="num_heads=3 must divide embed_dim=16"):
        MSDeformAttn(16, 3)
    with pytest.raises(ValueError, match="has no weights yet"):
        MSDeformAttn(**SIZES).locations_and_weights(*arrays(), spatial_shapes=LEVELS)


# ---- what a user of MultiHeadAttention tried


def test_what_is_frozen_stays_frozen(tmp_path):
    query, reference, value = keras.Input((7, 16)), keras.Input((7, 2, 4)), keras.Input((PIXELS, 16))
    layer = MSDeformAttn(**SIZES, trainable=False, name="layer")
    model = keras.Model([query, reference, value], layer(query, reference, value, LEVELS))
    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras"), keras.models.clone_model(model)):
        assert each.trainable_weights == []
        assert [sub.trainable for sub in each.get_layer("layer")._layers] == [False] * 4
        each.get_layer("layer").trainable = True
        assert len(each.trainable_weights) == 8


def test_two_projections_do_not_start_alike():
    layer = MSDeformAttn(**SIZES)
    layer.build((None, None, 16))
    assert (layer.value_proj.kernel.numpy() != layer.output_proj.kernel.numpy()).any()


def test_sizes_of_numpy():
    layer, inputs = make(), arrays()
    wanted = layer(*inputs, LEVELS)
    np.testing.assert_array_equal(layer(*inputs, np.array(LEVELS)), wanted)
    np.testing.assert_array_equal(layer(*inputs, spatial_shapes=np.array(LEVELS)), wanted)
    counts = {name: np.int64(value) for name, value in SIZES.items()}
    assert MSDeformAttn(**counts).get_config()["embed_dim"] == 16


def test_the_shape_that_is_said():
    layer = MSDeformAttn(**SIZES)
    assert layer.compute_output_shape((None, 7, 16), (None, 7, 2, 4), (3, PIXELS, 16)) == (3, 7, 16)


def test_locations_of_a_symbolic_tensor():
    _, reference, value = arrays()
    with pytest.raises(TypeError, match="is a symbolic tensor of a functional model; wanted arrays"):
        make().locations_and_weights(keras.Input((7, 16)), reference, value, spatial_shapes=LEVELS)
