"""`DeformConv1D`, `DeformConv2D` and `DeformConv3D` for Keras: the oracle's numbers, and all that a Keras layer does."""

import itertools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

from dcn_jax.interop import from_keras
from dcn_jax.keras import DeformConv1D, DeformConv2D, DeformConv3D
from tests.keras.support import fill, first, functional, last, normal
from tests.support import oracle

LAYERS = {1: DeformConv1D, 2: DeformConv2D, 3: DeformConv3D}
SIZES = {1: (9,), 2: (7, 6), 3: (4, 5, 6)}
X = normal(2, 7, 6, 4)
# What each case adds to `filters=6, kernel_size=3`, and what the oracle calls it.
GEOMETRIES = {
    "valid": ({}, {"padding": "VALID"}),
    "same": ({"padding": "same"}, {"padding": "SAME"}),
    "strides": ({"padding": "SAME", "strides": 2}, {"padding": "SAME", "strides": 2}),
    "dilation and strides": (
        {"padding": 2, "strides": 2, "dilation_rate": 2},
        {"padding": 2, "strides": 2, "kernel_dilation": 2},
    ),
    "groups": ({"padding": "same", "groups": 2, "offset_groups": 4}, {"padding": "SAME", "feature_group_count": 2}),
}


def make(rank=2, **options):
    """A layer with random weights, for four channels."""
    layer = LAYERS[rank](6, 3, **options)
    layer.build((None, 4, *SIZES[rank]) if layer.data_format == "channels_first" else (None, *SIZES[rank], 4))
    return fill(layer)


# ---- numbers


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_equals_the_oracle(rank, name):
    options, wanted = GEOMETRIES[name]
    layer, x = make(rank, **options), normal(2, *SIZES[rank], 4)
    offset, mask = map(np.asarray, layer.offset_and_mask(x))
    assert np.abs(offset).max() > 1
    kernel, bias = (np.asarray(weight) for weight in (layer.kernel, layer.bias))
    y = oracle.deform_conv(x, kernel, offset, mask, bias, **wanted)
    np.testing.assert_allclose(layer(x), y, rtol=0, atol=2e-5 * np.abs(y).max())
    np.testing.assert_allclose(layer([x, offset, mask]), layer(x), rtol=0, atol=1e-5)
    unmodulated = oracle.deform_conv(x, kernel, offset, None, bias, **wanted)
    np.testing.assert_allclose(layer([x, offset]), unmodulated, rtol=0, atol=2e-5 * np.abs(unmodulated).max())


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("options", [{}, {"padding": "same", "strides": 2}, {"padding": "same", "groups": 2}])
def test_a_new_layer_of_mask_scale_2_is_keras_s_convolution(rank, options):
    x = normal(2, *SIZES[rank], 4)
    plain = getattr(keras.layers, f"Conv{rank}D")(6, 3, activation="relu", **options)
    ours = LAYERS[rank](6, 3, activation="relu", mask_scale=2.0, **options)
    wanted = plain(x)
    ours.build(x.shape)
    for weight, value in zip((ours.kernel, ours.bias), plain.weights, strict=True):
        weight.assign(value)
    np.testing.assert_allclose(ours(x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("activation", ["linear", "softmax"])  # softmax is along the last axis, channels or not
def test_channels_first(rank, activation):
    x, options = normal(2, *SIZES[rank], 4), {"padding": "same", "strides": 2, "offset_groups": 2}
    ours, theirs = (
        make(rank, data_format=order, activation=activation, **options) for order in ("channels_last", "channels_first")
    )
    offset, mask = ours.offset_and_mask(x)
    moved = theirs.offset_and_mask(first(x))
    np.testing.assert_allclose(last(moved[0]), offset, rtol=0, atol=1e-5)
    np.testing.assert_allclose(last(moved[1]), mask, rtol=0, atol=1e-5)
    plain = make(rank, **options)
    y = keras.activations.get(activation)(first(plain(x)))
    np.testing.assert_allclose(theirs(first(x)), y, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs([first(x), first(offset), first(mask)]), y, rtol=0, atol=1e-5)
    assert theirs.compute_output_shape(first(x).shape) == y.shape


@pytest.mark.parametrize(
    "options",
    [
        {"max_offset": (1.5, None), "padding_mode": ("edge", "wrap")},
        {"offset_activation": "tanh", "modulated": False, "use_bias": False},
        {"padding": "circular", "offset_activation": lambda z: 2 * jnp.tanh(z)},
    ],
)
def test_equals_the_layer_of_nnx(options):
    layer = make(**{"padding": "same", **options})
    np.testing.assert_array_equal(layer(X), from_keras(layer)(X))


def test_gradients_are_those_of_nnx():
    layer = make(padding="same", offset_groups=2)

    def loss(weights):
        y, _ = layer.stateless_call(weights, [], X)
        return (y**2).sum()

    ours = jax.jit(jax.grad(loss))([weight.value for weight in layer.trainable_variables])
    wanted = nnx.grad(lambda module: (module(X) ** 2).sum())(from_keras(layer))
    wanted = [wanted.kernel, wanted.bias, wanted.offset_conv.kernel, wanted.offset_conv.bias]
    for mine, theirs in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs[...], rtol=1e-5, atol=1e-4)


# ---- dtypes


@pytest.mark.parametrize("name", ["mixed_bfloat16", "mixed_float16"])
def test_offsets_of_mixed_policies_are_float32(policy, name):
    """They are those of the branch's sums in float32, not rounded to half precision, and are used so."""
    exact = make(padding="same")
    policy(name)
    layer = make(padding="same")
    assert {weight.dtype for weight in layer.weights} == {"float32"}
    offset, mask = layer.offset_and_mask(X)
    assert offset.dtype == mask.dtype == jnp.float32
    half = layer.compute_dtype
    assert (offset != offset.astype(half).astype(jnp.float32)).any()
    wide, _ = exact.offset_and_mask(X)
    np.testing.assert_allclose(offset, wide, rtol=0, atol=0.05)
    y = layer(X)
    assert y.dtype == half
    np.testing.assert_array_equal(y, from_keras(layer)(X))
    np.testing.assert_allclose(np.asarray(y, np.float32), exact(X), rtol=0, atol=0.05 * np.abs(exact(X)).max())
    far = np.full(offset.shape, 3.001, np.float32)  # in half precision 3.0 or 3.002
    wanted = from_keras(layer)(X, far)
    np.testing.assert_array_equal(layer([X, far]), wanted)


def test_float64(policy, x64):
    policy("float64")
    layer, x = make(padding="same"), normal(2, 7, 6, 4, dtype="float64")
    offset, mask = map(np.asarray, layer.offset_and_mask(x))
    wanted = oracle.deform_conv(x, layer.kernel.numpy(), offset, mask, layer.bias.numpy(), padding="SAME")
    np.testing.assert_allclose(layer(x), wanted, rtol=0, atol=1e-12)


def test_pixels_of_bytes():
    x = np.random.default_rng(0).integers(0, 256, (2, 7, 6, 4), dtype=np.uint8)
    layer = make(padding="same")
    np.testing.assert_array_equal(layer(x), layer(x.astype(np.float32)))


# ---- models


def test_sizes_that_are_not_known():
    layer = DeformConv2D(6, 3, strides=2, padding="same")
    model = functional(layer, (None, None, 4), (None, None, 18), (None, 4, 9))
    assert model.output_shape == (None, None, None, 6)
    assert model.count_params() == 6 * (9 * 4 + 1) + 27 * (9 * 4 + 1)
    for height in (5, 8):
        out = -(-height // 2)
        arrays = [normal(2, height, 8, 4), normal(2, out, 4, 18), normal(2, out, 4, 9)]
        np.testing.assert_allclose(model(arrays), layer(arrays), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel_size", "options"),
    list(
        itertools.product(
            [1, 2, 3, (3, 2)],
            [
                {},
                {"padding": "same"},
                {"padding": "same", "strides": (2, 3)},
                {"strides": 3},
                {"padding": ((0, 2), (1, 1)), "dilation_rate": 2},
            ],
        )
    ),
)
def test_the_shape_that_is_said_is_the_shape_that_comes(kernel_size, options):
    layer = DeformConv2D(5, kernel_size, **options)
    y = layer(X)
    assert layer.compute_output_shape(X.shape) == y.shape
    unknown = layer.compute_output_shape((None, None, 6, 4))
    assert unknown == (None, None, *y.shape[2:])


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = DeformConv2D(4, 3, padding="same", kernel_regularizer="l2", kernel_constraint="max_norm")
        self.head = keras.layers.Dense(2)

    def call(self, x):
        return self.head(keras.ops.mean(self.conv(x), axis=(1, 2)))


@pytest.mark.parametrize("kind", ["functional", "subclassed"])
def test_fit_evaluate_predict(kind):
    keras.utils.set_random_seed(0)
    model = Subclassed()
    if kind == "functional":
        inputs = keras.Input((None, None, 4))
        model = keras.Model(inputs, model.call(inputs))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    x = rng.normal(size=(64, 7, 6, 4)) * (0.5 + labels[:, None, None, None])  # loud or not
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(True), metrics=["accuracy"])
    branch = next(layer for layer in model._flatten_layers() if isinstance(layer, DeformConv2D))
    before = model.evaluate(x, labels, verbose=0)
    moved = branch.offset_conv.kernel.numpy()
    history = model.fit(x, labels, batch_size=16, epochs=15, verbose=0).history
    loss, accuracy = model.evaluate(x, labels, verbose=0)
    assert loss < 0.7 * before[0]
    assert accuracy > 0.8
    assert np.isfinite(history["loss"]).all()
    assert (branch.offset_conv.kernel.numpy() != moved).all()
    assert branch.losses
    assert float(branch.losses[0]) > 0
    assert model.predict(x, verbose=0).shape == (64, 2)


def test_a_branch_that_is_frozen():
    layer = make(padding="same")
    layer.offset_conv.trainable = False
    assert [weight.path.split("/")[-1] for weight in layer.trainable_weights] == ["kernel", "bias"]
    model = functional(layer, (None, None, 4))
    model.compile("sgd", "mse")
    before = [weight.numpy() for weight in layer.weights]
    model.fit(X, np.zeros((2, 7, 6, 6)), verbose=0)
    changed = [(weight.numpy() != old).any() for weight, old in zip(layer.weights, before, strict=True)]
    assert changed == [weight.trainable for weight in layer.weights]
    assert sum(changed) == 2


OPTIONS = {
    "strides": 2,
    "padding": ((1, 2), (0, 1)),
    "dilation_rate": (1, 2),
    "groups": 2,
    "activation": "relu",
    "kernel_initializer": "he_normal",
    "kernel_regularizer": "l2",
    "bias_regularizer": "l1",
    "activity_regularizer": "l1",
    "kernel_constraint": "max_norm",
    "bias_constraint": "non_neg",
    "offset_groups": 2,
    "mask_scale": 2.0,
    "max_offset": (3.0, None),
    "padding_mode": ("edge", "wrap"),
    "offset_kernel_initializer": keras.initializers.RandomNormal(stddev=0.3, seed=1),
    "offset_activation": "tanh",
    "offset_trainable": False,
    "name": "deformed",
    "trainable": False,
}


def test_config_makes_the_same_layer():
    layer = DeformConv2D(6, 3, **OPTIONS)
    config = layer.get_config()
    other = DeformConv2D.from_config(config)
    assert other.get_config() == config
    assert other.name == "deformed"
    assert not other.trainable
    # Every argument is in it, but for what the base class takes.
    assert set(OPTIONS) | {"filters", "kernel_size", "data_format", "use_bias", "modulated", "dtype"} <= set(config)


@pytest.mark.parametrize("outside", [False, True], ids=["branch", "offsets from outside"])
def test_saved_and_loaded(tmp_path, outside):
    layer = DeformConv2D(6, 3, **OPTIONS, offset_branch=not outside)
    shapes = [(9, 8, 4), (5, 3, 36), (5, 3, 18)] if outside else [(None, None, 4)]
    model = functional(layer, *shapes)
    fill(layer)
    arrays = [normal(2, *(8 if size is None else size for size in shape)) for shape in shapes]
    arrays = arrays if outside else arrays[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.layers[-1], DeformConv2D)
    np.testing.assert_array_equal(loaded(arrays), model(arrays))
    model.save_weights(tmp_path / "model.weights.h5")
    before = model(arrays)
    fill(layer, scale=0.1)
    model.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(model(arrays), before)


def test_data_parallel():
    """Eight devices, the batch divided: the losses of one device."""
    x, y = normal(32, 7, 6, 4), normal(32, 7, 6, 6, seed=1)

    def losses():
        layer = DeformConv2D(6, 3, padding="same")
        model = functional(layer, (7, 6, 4))
        fill(layer)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0).history["loss"], layer

    alone, _ = losses()
    devices = keras.distribution.list_devices("cpu")
    assert len(devices) == 8
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    try:
        together, layer = losses()
        assert len(layer.kernel.value.sharding.device_set) == 8
    finally:
        keras.distribution.set_distribution(before)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


# ---- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"filters": 0}, ValueError, "filters=0 is too small"),
        ({"groups": 4}, ValueError, "groups=4 must divide filters=6"),
        ({"filters": 9, "groups": 3}, ValueError, "groups=3 must divide the 4 channels"),
        ({"offset_groups": 3}, ValueError, "offset_groups=3 must divide the 4 channels"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size=\(3, 3, 3\) has 3 entries"),
        ({"strides": 0}, ValueError, "strides=0 is too small"),
        ({"dilation_rate": 1.5}, TypeError, "dilation_rate=1.5 is not made of ints"),
        ({"padding": "causal"}, ValueError, "the result is not causal"),
        ({"padding": "full"}, ValueError, "padding='full' is not known"),
        ({"data_format": "NCHW"}, ValueError, "data_format='NCHW' is not known; wanted one of"),
        ({"padding_mode": "border"}, ValueError, "padding_mode='border' is not known"),
        ({"modulated": "yes"}, TypeError, "modulated='yes' is a str; wanted True or False"),
        ({"mask_scale": 0}, ValueError, "mask_scale=0 must be positive"),
        ({"max_offset": -1}, ValueError, "max_offset=-1 must be finite and not negative"),
        ({"implementation": "cuda"}, ValueError, "implementation='cuda' is not known"),
        ({"offset_branch": False}, ValueError, r"call layer\(\[inputs, offset\]\)"),
        ({"kernel_size": 9}, ValueError, "the output has no positions"),
        ({"feature_group_count": 2}, ValueError, "Unrecognized keyword arguments"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        DeformConv2D(**{"filters": 6, "kernel_size": 3, **options})(X)


@pytest.mark.parametrize("symbolic", [False, True], ids=["arrays", "functional"])
@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (
            [(7, 6)],
            {},
            r"inputs has shape .*; wanted \(batch, height, width, channels\), since data_format='channels_last'",
        ),
        (
            [(7, 6, 4), (7, 6, 27)],
            {},
            r"offset has shape .*27\); wanted \(.*, 7, 6, 18\): .* 2 values for each of 1 \* 9 taps",
        ),
        ([(7, 6, 4), (6, 7, 18)], {}, r"offset has shape .*; wanted \(.*, 7, 6, 18\)"),
        (
            [(7, 6, 4), (7, 6, 18), (7, 6, 18)],
            {},
            r"mask has shape .*; wanted \(.*, 7, 6, 9\): .* one for each of 1 \* 9 taps",
        ),
        (
            [(4, 7, 6), (7, 6, 18)],
            {"data_format": "channels_first"},
            r"offset has shape .*; wanted \(.*, 18, 7, 6\)",
        ),
    ],
)
def test_shapes_that_do_not_fit(shapes, options, message, symbolic):
    inputs = [keras.Input(shape) if symbolic else normal(2, *shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        DeformConv2D(6, 3, padding="same", **options)(inputs if len(inputs) > 1 else inputs[0])


def test_other_channels_than_the_layer_was_built_for():
    layer = make(padding="same", groups=2)
    with pytest.raises(ValueError, match=r"inputs has shape \(2, 7, 6, 5\); wanted \(batch, height, width, 4\)"):
        layer(normal(2, 7, 6, 5))


def test_channels_that_are_not_known():
    with pytest.raises(ValueError, match="wanted a known number of channels"):
        DeformConv2D(6, 3)(keras.Input((7, 6, None)))


def test_offsets_of_a_layer_without_weights():
    with pytest.raises(ValueError, match="has no weights yet"):
        DeformConv2D(6, 3).offset_and_mask(X)


def test_model_parallel():
    """Filters divided over four devices and the batch over two, by the rule that the page gives."""
    x, y = normal(8, 7, 6, 4), normal(8, 7, 6, 8, seed=1)

    def loss():
        layer = DeformConv2D(8, 3, padding="same", kernel_initializer=keras.initializers.GlorotUniform(seed=0))
        model = functional(layer, (7, 6, 4))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model.fit(x, y, epochs=2, verbose=0).history["loss"], layer

    alone, _ = loss()
    mesh = keras.distribution.DeviceMesh((2, 4), ["batch", "model"], devices=keras.distribution.list_devices("cpu"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["^(?!.*offset_conv).*kernel"] = (None, None, None, "model")
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
    try:
        together, layer = loss()
        assert layer.kernel.value.addressable_shards[0].data.shape == (3, 3, 4, 2)
    finally:
        keras.distribution.set_distribution(before)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


# ---- what a user of Conv2D tried


def moved(model, layer):
    """Which of a layer's weights a step of training moves."""
    before = [weight.numpy() for weight in layer.weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(X, np.ones((2, 7, 6, 6)), verbose=0)
    changed = [(weight.numpy() != old).any() for weight, old in zip(layer.weights, before, strict=True)]
    return {weight.path.split("/", 1)[1] for weight, each in zip(layer.weights, changed, strict=True) if each}


ALL = {"kernel", "bias", "offset_conv/kernel", "offset_conv/bias"}


@pytest.mark.parametrize("again", ["as it was", "saved", "cloned"])
@pytest.mark.parametrize("frozen", ["whole", "whole, later", "branch", "branch, later"])
def test_what_is_frozen_stays_frozen(frozen, again, tmp_path):
    options = {"whole": {"trainable": False}, "branch": {"offset_trainable": False}}.get(frozen, {})
    layer = DeformConv2D(6, 3, padding="same", name="layer", **options)
    model = functional(layer, (7, 6, 4))
    if frozen == "whole, later":
        layer.trainable = False
    elif frozen == "branch, later":
        layer.offset_conv.trainable = False
    if again == "saved":
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    elif again == "cloned":
        model = keras.models.clone_model(model)
    layer = fill(model.get_layer("layer"), scale=0.3)
    wanted = set() if frozen.startswith("whole") else {"kernel", "bias"}
    head = keras.Sequential([model, keras.layers.Dense(6)])  # a model without weights to train cannot be fit
    assert moved(head, layer) == wanted
    assert {weight.path.split("/", 1)[1] for weight in layer.trainable_weights} == wanted
    layer.trainable = True
    if frozen.startswith("whole"):
        assert moved(head, layer) == ALL


def test_none_at_the_end_stands_for_nothing():
    layer, offset = make(padding="same"), normal(2, 7, 6, 18, seed=5)
    np.testing.assert_array_equal(layer([X, offset, None]), layer([X, offset]))
    np.testing.assert_array_equal(layer([X, None]), layer(X))


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, offset: layer(X, offset),
        lambda layer, offset: layer([X, None, offset]),
        lambda layer, offset: layer([]),
        lambda layer, offset: layer({"x": X}),
        lambda layer, offset: layer([X] * 4),
        lambda layer, offset: layer.offset_and_mask([X, None, offset]),
    ],
)
def test_a_call_that_is_none_says_what_it_takes(call):
    message = r"wanted one tensor, the map, or a list of two or three: layer\(\[inputs, offset\]\)"
    with pytest.raises(TypeError, match=message):
        call(make(padding="same"), normal(2, 7, 6, 18))


def test_offsets_of_a_symbolic_tensor():
    with pytest.raises(TypeError, match="offset_and_mask takes arrays"):
        make(padding="same").offset_and_mask(keras.Input((7, 6, 4)))


@pytest.mark.parametrize("name", ["use_bias", "offset_trainable"])
def test_what_is_true_or_false(name):
    with pytest.raises(TypeError, match=f"{name}='no' is a str; wanted True or False"):
        DeformConv2D(6, 3, **{name: "no"})


@pytest.mark.parametrize("options", [{}, {"padding_mode": "edge", "strides": 2, "padding": 1}])
@pytest.mark.parametrize("mode", ["full", "larger_than"])
def test_within_a_scope_of_rematerialisation(options, mode):
    with keras.RematScope(mode=mode, output_size_threshold=1):
        layer = make(**options)
    np.testing.assert_allclose(layer(X), make(**options)(X), rtol=0, atol=1e-6)


def test_a_masked_input_warns_as_conv1d_does():
    masked = keras.layers.Masking()(np.ones((2, 9, 4), "float32"))
    for kind in (keras.layers.Conv1D, DeformConv1D):
        with pytest.warns(UserWarning, match="does not support mask") as seen:
            kind(6, 3)(masked)
        assert len(seen) == 1


def test_the_data_format_in_any_case():
    assert DeformConv2D(6, 3, data_format="CHANNELS_LAST").data_format == "channels_last"
