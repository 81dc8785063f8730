"""What the linen and the nnx layer must do alike: parameters, values, what they sow, dtypes, and errors."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dcn_jax
from dcn_jax._core.pallas.launch import interpret
from tests.support.layers import FRAMEWORKS, PLAIN, convolutions, fill, linen, nnx_
from tests.support.running import normal

pytestmark = pytest.mark.lenient
X = normal(2, 5, 6, 4)


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
def make(framework):
    """A function that makes the layer of one framework."""
    return FRAMEWORKS[framework]


def shapes(params):
    return jax.tree.map(jnp.shape, params)


# ---- parameters


@pytest.mark.parametrize(
    ("kernel_size", "options", "kernel", "emitted"),
    [
        (3, {}, (3, 4, 6), 6),  # an int is a one-dimensional window
        ((3,), {"modulated": False}, (3, 4, 6), 3),
        ((3, 2), {}, (3, 2, 4, 6), 18),
        ((3, 2), {"modulated": False}, (3, 2, 4, 6), 12),
        ((3, 2), {"offset_groups": 4, "feature_group_count": 2}, (3, 2, 2, 6), 4 * 18),
        ((1, 2, 2), {}, (1, 2, 2, 4, 6), 16),
    ],
)
def test_parameters_have_the_contract_s_names_and_shapes(make, kernel_size, options, kernel, emitted):
    window = kernel[:-2]
    assert shapes(jax.eval_shape(make(4, 6, kernel_size, **options).init)) == {
        "kernel": kernel,
        "bias": (6,),
        "offset_conv": {"kernel": (*window, 4, emitted), "bias": (emitted,)},
    }


def test_without_bias_the_offset_convolution_keeps_its_own(make):
    params = jax.eval_shape(make(4, 6, (2, 2), use_bias=False).init)
    assert params.keys() == {"kernel", "offset_conv"}
    assert params["offset_conv"].keys() == {"kernel", "bias"}


def test_the_offset_branch_starts_at_zero_and_the_kernel_like_flax_s(make, framework):
    params, plain = (
        jax.jit(layer.init)() for layer in (make(4, 6, (3, 3)), make(4, 6, (3, 3), layer=PLAIN[framework]))
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params["offset_conv"]))
    np.testing.assert_array_equal(params["kernel"], plain["kernel"])  # the same key draws the same kernel
    np.testing.assert_array_equal(params["bias"], plain["bias"])


def test_initializers(make):
    ones, twos = jax.nn.initializers.constant(1), jax.nn.initializers.constant(2)
    threes, fours = jax.nn.initializers.constant(3), jax.nn.initializers.constant(4)
    layer = make(4, 6, (2, 2), kernel_init=ones, bias_init=twos, offset_kernel_init=threes, offset_bias_init=fours)
    params = jax.jit(layer.init)()
    flat = [params["kernel"], params["bias"], params["offset_conv"]["kernel"], params["offset_conv"]["bias"]]
    for value, leaf in enumerate(flat, start=1):
        np.testing.assert_array_equal(leaf, value)


def test_param_dtype(make):
    params = jax.eval_shape(make(4, 6, (2, 2), param_dtype=jnp.bfloat16).init)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


# ---- values


def by_hand(params, x, *, modulated=True, mask_scale=1.0, max_offset=None, offset_groups=1, use_bias=True, **options):
    """The layer by its formula: XLA's convolution emits offsets and logits, the op does the rest."""
    kernel = params["kernel"]
    rank = kernel.ndim - 2
    geometry = {name: options.get(name, default) for name, default in [("strides", 1), ("kernel_dilation", 1)]}
    geometry = {name: (v,) * rank if isinstance(v, int) else v for name, v in geometry.items()}
    padding = options.get("padding", "SAME")
    letters = "DHW"[-rank:]
    z = lax.conv_general_dilated(
        x,
        params["offset_conv"]["kernel"],
        geometry["strides"],
        [(padding, padding)] * rank if isinstance(padding, int) else padding,
        rhs_dilation=geometry["kernel_dilation"],
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
    )
    z = z + params["offset_conv"]["bias"]
    offset = z[..., : offset_groups * np.prod(kernel.shape[:rank]) * rank]
    logits = z[..., offset.shape[-1] :]
    if max_offset is not None:
        offset = max_offset * jnp.tanh(offset / max_offset)
    mask = mask_scale / (1 + jnp.exp(-logits)) if modulated else None
    groups = options.get("feature_group_count", 1)
    return dcn_jax.deform_conv(
        x, kernel, offset, mask, params.get("bias"), padding=padding, feature_group_count=groups, **geometry
    )


CONFIGURATIONS = {
    "plain": ((3, 3), {}),
    "1-D": (3, {"strides": 2}),
    "3-D": ((2, 1, 2), {"padding": "VALID"}),
    "v1": ((3, 2), {"modulated": False, "padding": 1}),
    "bounded": ((2, 2), {"max_offset": 1.5, "mask_scale": 2.0, "use_bias": False}),
    "groups": ((3, 3), {"feature_group_count": 2, "offset_groups": 4, "strides": (2, 1), "padding": ((1, 0), (0, 2))}),
    "dilated": ((2, 3), {"kernel_dilation": (2, 1), "offset_groups": 2}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_linen_nnx_and_the_formula_agree(name):
    kernel_size, options = CONFIGURATIONS[name]
    rank = 1 if isinstance(kernel_size, int) else len(kernel_size)
    x = normal(2, *(5, 4, 3)[:rank], 4, seed=1)
    ours, theirs = linen(4, 6, kernel_size, **options), nnx_(4, 6, kernel_size, **options)
    params = fill(ours)
    assert shapes(params) == shapes(jax.eval_shape(theirs.init))

    @jax.jit
    def all_three(params, x):
        return ours.apply(params, x), theirs.apply(params, x), by_hand(params, x, **options)

    linen_y, nnx_y, expected = all_three(params, x)
    np.testing.assert_array_equal(linen_y, nnx_y)
    np.testing.assert_allclose(linen_y, expected, rtol=1e-4, atol=1e-4)
    assert np.std(expected) > 0.1


@pytest.mark.parametrize(("options", "share"), [({}, 0.5), ({"mask_scale": 2.0}, 1.0), ({"modulated": False}, 1.0)])
def test_a_fresh_layer_is_a_share_of_the_plain_convolution(make, framework, options, share):
    bias = jax.nn.initializers.constant(0.25)
    layer = make(4, 6, (3, 3), bias_init=bias, **options)
    plain = make(4, 6, (3, 3), bias_init=bias, layer=PLAIN[framework])
    ours, theirs = jax.jit(lambda x: (layer.apply(layer.init(), x), plain.apply(plain.init(), x)))(X)
    np.testing.assert_allclose(ours - 0.25, share * (theirs - 0.25), rtol=1e-5, atol=1e-5)


def test_offsets_come_before_logits_group_by_group(make):
    """Only the biases of the offset convolution are set: each channel's meaning shows in what is sown."""
    layer = make(4, 6, (1, 2), offset_groups=2)
    z = jnp.linspace(-1, 1, 2 * 2 * 3)
    seen = jax.jit(layer.look)(with_offset_bias(layer, z), X)
    np.testing.assert_allclose(seen["offset"][1, 2, 3], z[:8], rtol=1e-6)
    np.testing.assert_allclose(seen["mask"][1, 2, 3], jax.nn.sigmoid(z[8:]), rtol=1e-6)


def with_offset_bias(layer, z):
    """Parameters of zeros, but for what the offset convolution emits everywhere."""
    params = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), jax.eval_shape(layer.init))
    params["offset_conv"]["bias"] = jnp.asarray(z, jnp.float32)
    return params


def test_the_bound_is_passed_on_to_the_implementation_that_needs_one(make):
    """The largest of the axes', for the branch's own offsets alone: others would be clipped."""
    options = {"max_offset": (1.0, 2.0), "precision": "highest"}
    layer, plain = make(4, 6, (2, 2), implementation="pallas_tpu", **options), make(4, 6, (2, 2), **options)
    params = fill(plain, scale=2.0)
    with interpret():
        y = jax.jit(layer.apply)(params, X)
        np.testing.assert_allclose(y, jax.jit(plain.apply)(params, X), rtol=0, atol=1e-4)
        for given in ({"base_offset": jnp.ones((5, 6, 2))}, {"offset": jnp.ones((5, 6, 8))}):
            with pytest.raises(ValueError, match="max_offset=None"):
                jax.eval_shape(layer.apply, params, X, **given)
        with pytest.raises(ValueError, match="max_offset=None"):
            jax.eval_shape(make(4, 6, (2, 2), implementation="pallas_tpu", max_offset=(1.0, None)).apply, params, X)
    assert "clamp" not in str(jax.make_jaxpr(plain.apply)(params, X))


def test_max_offset_bounds_smoothly(make):
    layer = make(4, 2, (2, 2), max_offset=2.0, modulated=False)
    z = jnp.array([0.0, 0.01, -0.02, -0.7, 1.5, 3.0, -50.0, 1e9])
    offset = jax.jit(layer.look)(with_offset_bias(layer, z), X)["offset"][0, 0, 0]
    np.testing.assert_allclose(offset, 2.0 * np.tanh(z / 2.0), rtol=1e-5)
    np.testing.assert_allclose(offset[:3], z[:3], rtol=1e-4)  # small offsets are left alone
    assert np.abs(offset).max() <= 2.0


def test_it_sows_offset_and_mask(make):
    layer = make(4, 6, (3, 3), strides=2)
    assert shapes(jax.eval_shape(layer.look, fill(layer), X)) == {"offset": (2, 3, 3, 18), "mask": (2, 3, 3, 9)}
    layer = make(4, 6, (3, 3), modulated=False)
    assert shapes(jax.eval_shape(layer.look, fill(layer), X)) == {"offset": (2, 5, 6, 18)}


def test_what_it_sows_makes_its_result(make):
    layer = make(4, 6, (2, 2), offset_groups=2, mask_scale=2.0, max_offset=1.0)
    params = fill(layer)

    @jax.jit
    def both(params, x):
        seen = layer.look(params, x)
        return layer.apply(params, x), dcn_jax.deform_conv(x, params["kernel"], **seen, bias=params["bias"])

    np.testing.assert_allclose(*both(params, X), rtol=1e-5, atol=1e-5)


def test_batch_axes(make):
    """None, one or many, as Flax's own convolution takes them: each image is its own."""
    layer = make(2, 3, (2, 2), offset_groups=2)
    params, x = fill(layer), normal(2, 3, 4, 3, 2, seed=2)

    @jax.jit
    def all_three(params, x):
        return layer.apply(params, x), layer.apply(params, x[1]), layer.apply(params, x[1, 2])

    two, one, none = all_three(params, x)
    assert (two.shape, one.shape, none.shape) == ((2, 3, 4, 3, 3), (3, 4, 3, 3), (4, 3, 3))
    np.testing.assert_allclose(two[1], one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one[2], none, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"strides": None}, {"kernel_dilation": None}, {"strides": [1, 1]}, {"padding": "same"}]
)
def test_spellings_that_flax_takes(make, options):
    layer, plain = make(4, 6, (2, 2), **options), make(4, 6, (2, 2))
    params = fill(plain)
    programs = [str(jax.make_jaxpr(each.apply)(params, X)) for each in (layer, plain)]
    assert programs[0] == programs[1]


def test_an_empty_batch(make):
    layer = make(4, 6, (2, 2))
    assert jax.eval_shape(layer.apply, fill(layer), jnp.zeros((0, 5, 6, 4))).shape == (0, 5, 6, 6)


# ---- dtypes


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"param_dtype": "bfloat16"}, {"dtype": "float16"}])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "int32"])
def test_the_result_s_dtype_is_that_of_flax_s_own(make, framework, options, x_dtype):
    x = jax.ShapeDtypeStruct(X.shape, x_dtype)
    results = []
    for kind in ({}, {"layer": PLAIN[framework]}):
        layer = make(4, 6, (2, 2), **options, **kind)
        results.append(jax.eval_shape(layer.apply, fill(layer), x).dtype)
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_offset_and_mask_are_float32_whatever_the_layer_s_dtype(make, dtype):
    layer = make(4, 6, (2, 2), dtype=dtype, max_offset=2.0, mask_scale=2.0)
    seen = jax.eval_shape(layer.look, fill(layer), X)
    assert {value.dtype for value in seen.values()} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(layer.apply, fill(layer), X).dtype == jnp.dtype(dtype or jnp.float32)


@pytest.mark.parametrize(("make_one", "dtype", "tolerance"), [(linen, "bfloat16", 0.05), (nnx_, "float16", 0.01)])
def test_half_precision_is_near_float32(make_one, dtype, tolerance):
    """Offsets of 0.5 and logits of 0, which both dtypes hold, so that only the products differ."""
    full, layer = make_one(4, 6, (3, 3)), make_one(4, 6, (3, 3), dtype=dtype)
    params = fill(full)
    params["offset_conv"] = with_offset_bias(full, [0.5] * 18 + [0.0] * 9)["offset_conv"]

    def gradient(layer):
        return jax.grad(lambda params: (layer.apply(params, X).astype(jnp.float32) ** 2).mean())

    expected, actual = jax.jit(lambda params: (gradient(full)(params), gradient(layer)(params)))(params)
    for wanted, got in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert got.dtype == jnp.float32  # that of the parameters
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_positions_stay_in_float32_when_the_layer_computes_in_bfloat16(make):
    """A map 3,000 pixels wide, half a pixel to the right: bfloat16 has no half above 256."""
    layer = make(1, 1, 1, dtype="bfloat16", modulated=False)
    x = (jnp.arange(3000) % 2).astype(jnp.float32)[:, None] * 2  # 0, 2, 0, 2, …: half-way it is 1 everywhere
    params = with_offset_bias(layer, [0.5]) | {"kernel": jnp.ones((1, 1, 1))}
    np.testing.assert_array_equal(jax.jit(layer.apply)(params, x)[:-1], 1)


def test_precision_reaches_both_products(make):
    layer = make(4, 6, (2, 2), precision="highest")
    program = jax.jit(layer.apply).lower(fill(layer), X).as_text()  # where the op's own product is traced
    products = dict(re.findall(r"stablehlo\.(convolution|dot_general)(.*)", program))
    assert products.keys() == {"convolution", "dot_general"}
    assert all("HIGHEST" in parameters for parameters in products.values())


def test_an_own_promote_dtype_is_used(make):
    def to_float16(*args, dtype=None):
        arrays = args[0] if isinstance(args[0], tuple) else args
        return tuple(None if a is None else a.astype(jnp.float16) for a in arrays)

    layer = make(4, 6, (2, 2), promote_dtype=to_float16)
    assert jax.eval_shape(layer.apply, jax.eval_shape(layer.init), X).dtype == jnp.float16
    assert convolutions(layer.look, fill(layer), X) == [("f16", "f16", "f32")]  # its sums are kept


# ---- transformations


def test_gradients_reach_every_parameter(make):
    """Of a fresh layer too: its offsets are zero, their gradient is not."""
    layer = make(4, 6, (3, 3))
    gradients = jax.jit(lambda x: jax.grad(lambda p: (layer.apply(p, x) ** 2).sum())(layer.init()))(X)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf), path


def test_vmap_over_images_is_the_batch(make):
    layer = make(4, 6, (2, 2))
    params = fill(layer)
    together, mapped = jax.jit(lambda p, x: (layer.apply(p, x), jax.vmap(lambda image: layer.apply(p, image))(x)))(
        params, X
    )
    np.testing.assert_allclose(together, mapped, rtol=1e-5, atol=1e-5)


# ---- errors

ERRORS = {
    "kernel_size rank": ((2,) * 4, {}, ValueError, r"kernel_size=\(2, 2, 2, 2\) has 4 entries; wanted 1, 2 or 3"),
    "kernel_size kind": ((2, 1.5), {}, TypeError, r"kernel_size=\(2, 1.5\) is not made of ints"),
    "kernel_size zero": ((2, 0), {}, ValueError, r"kernel_size=\(2, 0\) is too small; wanted at least 1"),
    "strides": ((2, 2), {"strides": (1, 1, 1)}, ValueError, r"strides=\(1, 1, 1\) has 3 entries; wanted an int or 2 ints"),
    "kernel_dilation": ((2, 2), {"kernel_dilation": 0}, ValueError, "kernel_dilation=0 is too small"),
    "padding": ((2, 2), {"padding": "FULL"}, ValueError, "padding='FULL' is not known; wanted \"SAME\""),
    "CAUSAL": ((2,), {"padding": "CAUSAL"}, ValueError, "padding='CAUSAL' has no meaning in a deformable"),
    "no output": ((7, 7), {"padding": "VALID"}, ValueError, r"the output has no positions: a window of extent \(7, 7\)"),
    "feature_group_count": ((2, 2), {"feature_group_count": 3}, ValueError, "feature_group_count=3 must divide the 4 channels"),
    "feature_group_count kind": ((2, 2), {"feature_group_count": "2"}, TypeError, "feature_group_count='2' is a str; wanted an int"),
    "offset_groups": ((2, 2), {"offset_groups": 3}, ValueError, "offset_groups=3 must divide the 4 channels of the input"),
    "offset_groups kind": ((2, 2), {"offset_groups": 1.0}, TypeError, "offset_groups=1.0 is a float; wanted an int"),
    "offset_groups zero": ((2, 2), {"offset_groups": 0}, ValueError, "offset_groups=0 is too small; wanted at least 1"),
    "modulated": ((2, 2), {"modulated": 2}, TypeError, "modulated=2 is a int; wanted True or False"),
    "mask_scale": ((2, 2), {"mask_scale": 0.0}, ValueError, "mask_scale=0.0 must be positive and finite"),
    "mask_scale kind": ((2, 2), {"mask_scale": "1"}, TypeError, "mask_scale='1' is a str; wanted the modulation's upper bound"),
    "max_offset": ((2, 2), {"max_offset": -1}, ValueError, "max_offset=-1 must be finite and not negative"),
    "max_offset inf": ((2, 2), {"max_offset": float("inf")}, ValueError, "max_offset=inf must be finite and not negative: .* None"),
    "max_offset kind": ((2, 2), {"max_offset": True}, TypeError, "max_offset=True is a bool; wanted a number of pixels"),
    "max_offset axes": ((2, 2), {"max_offset": (1, 2, 3)}, ValueError, r"max_offset=\(1, 2, 3\) has 3 entries; wanted .* 2 spatial axes"),
    "max_offset axis": ((2, 2), {"max_offset": (1, "2")}, TypeError, r"max_offset=\(1, '2'\) is a tuple; wanted a number of pixels"),
    "padding_mode": ((2, 2), {"padding_mode": "border"}, ValueError, "padding_mode='border' is not known; .* is \"edge\""),
    "padding_mode axes": ((2, 2), {"padding_mode": ("wrap",)}, ValueError, r"padding_mode=\('wrap',\) has 1 entries"),
    "padding_mode twice": ((2, 2), {"padding": "CIRCULAR", "padding_mode": "edge"}, ValueError, "padding='CIRCULAR' means padding_mode='wrap'"),
    "offset_branch": ((2, 2), {"offset_branch": 0}, TypeError, "offset_branch=0 is a int; wanted True or False"),
    "offset_conv_cls": ((2, 2), {"offset_conv_cls": 3}, TypeError, r"offset_conv_cls is a int; wanted a function that makes the branch, called as"),
    "offset_conv_cls twice": ((2, 2), {"offset_conv_cls": dict, "offset_branch": False}, ValueError, "leave one of them out"),
    "implementation": ((2, 2), {"implementation": "cuda"}, ValueError, "implementation='cuda' is not known; wanted one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_options_that_make_no_sense(make, name):
    kernel_size, options, error, message = ERRORS[name]

    def make_and_trace():
        layer = make(4, 6, kernel_size, **options)
        jax.eval_shape(layer.apply, jax.eval_shape(layer.init), X)

    with pytest.raises(error, match=message):
        make_and_trace()


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            jnp.ones((6, 4)),
            ValueError,
            r"inputs has shape \(6, 4\); wanted \(\*batch, \*spatial, .\) with 2 spatial axes, as",
        ),
        ([[1.0]], TypeError, "inputs is a list; wanted an array"),
        (jnp.ones((0, 6, 4)), ValueError, r"spatial=\(0, 6\) is too small"),
    ],
)
def test_inputs_that_make_no_sense(make, x, error, message):
    layer = make(4, 6, (2, 2))
    with pytest.raises(error, match=message):
        layer.apply(fill(layer), x)


@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_without_flax_the_error_names_the_extra(module):
    """In a fresh process that cannot import Flax."""
    program = f"import sys; sys.modules['flax'] = None; import dcn_jax; import dcn_jax.{module}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f'ImportError: dcn_jax.{module} needs the extra "flax": pip install "dcn-jax[flax]"' in result.stderr
