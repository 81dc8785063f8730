"""What both layers compute with: half precision, borders, and sizes that are known only when an exported layer is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from tests.support.layers import FRAMEWORKS, PLAIN, convolutions, fill
from tests.support.running import assert_close, normal

pytestmark = pytest.mark.lenient
X = normal(2, 5, 6, 4)


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
def make(framework):
    """A function that makes the layer of one framework."""
    return FRAMEWORKS[framework]


# ---- half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_offsets_of_a_half_layer_are_as_near_as_its_products(make, dtype):
    """Near 8 bfloat16 has steps of 1/32 pixel, float16 of 1/128; what is left comes of inputs and kernel in half."""
    full, half = make(4, 6, (3, 3)), make(4, 6, (3, 3), dtype=dtype)
    params = fill(full, scale=0.05)
    params["offset_conv"]["bias"] = jnp.linspace(7.8, 8.2, 27)
    wanted, got = jax.jit(lambda p: (full.look(p, X), half.look(p, X)))(params)
    products = (
        float(jnp.finfo(dtype).eps) * jnp.abs(params["offset_conv"]["kernel"]).sum((0, 1, 2)).max() * jnp.abs(X).max()
    )
    for name in ("offset", "mask"):
        assert got[name].dtype == jnp.float32
        error = np.abs(got[name] - wanted[name]).max()
        assert error < products / 4, (name, error)
    coarse = got["offset"].astype(dtype).astype(jnp.float32)
    assert np.abs(coarse - wanted["offset"]).max() > 4 * np.abs(got["offset"] - wanted["offset"]).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_branch_costs_no_wide_product(make, dtype):
    """Forward its operands are halves and its result is float32; backward all three are halves."""
    layer = make(4, 6, (3, 3), dtype=dtype)
    params, short = fill(layer), {"bfloat16": "bf16", "float16": "f16"}[dtype]
    assert convolutions(layer.apply, params, X) == [(short, short, "f32")]
    forward, *backward = convolutions(jax.grad(lambda p, x: layer.apply(p, x).sum(), (0, 1)), params, X)
    assert forward == (short, short, "f32")
    assert backward == [(short, short, short)] * 2  # of the kernel, and of x


def test_derivatives_through_a_half_branch(make):
    """In both modes and twice: those of a float32 layer of the same numbers, as near as halves are."""
    full, half = make(4, 6, (3, 3)), make(4, 6, (3, 3), dtype="bfloat16")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), fill(full, scale=0.1))
    x = X.astype(jnp.bfloat16).astype(jnp.float32)

    @jax.jit
    def derivatives(params):
        def of(layer):
            def loss(params):
                seen = layer.look(params, x)
                return jnp.mean(jnp.sin(seen["offset"])) + jnp.mean(seen["mask"] ** 2)

            gradient = jax.grad(loss)
            return jax.jvp(loss, (params,), (params,))[1], gradient(params), jax.jvp(gradient, (params,), (params,))[1]

        return of(full), of(half)

    wanted, got = derivatives(params)
    wanted, got = (jax.tree.leaves([each[0], *(part["offset_conv"] for part in each[1:])]) for each in (wanted, got))
    for w, g in zip(wanted, got, strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=0.03 * np.abs(w).max())


def test_an_injected_convolution_is_used_as_it_is(make):
    layer = make(
        4, 6, (3, 3), dtype="bfloat16", conv_general_dilated=lambda *a, **k: jax.lax.conv_general_dilated(*a, **k)
    )
    assert convolutions(layer.apply, fill(layer), X) == [("bf16", "bf16", "bf16")]


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64(make):
    layer = make(4, 6, (2, 2), param_dtype="float64")
    seen = jax.eval_shape(layer.look, fill(layer), X.astype("float64"))
    assert {value.dtype for value in seen.values()} == {jnp.dtype("float64")}


# ---- borders


@pytest.mark.parametrize(
    "options",
    [{"padding": "CIRCULAR"}, {"padding_mode": ("zeros", "wrap")}, {"padding_mode": "wrap", "kernel_dilation": 2}],
)
def test_a_rolled_panorama_gives_a_rolled_result(make, options):
    """At offsets of several pixels: the branch reads round the back too. With "zeros" it does not."""
    layer, plain = make(4, 6, (3, 3), max_offset=6.0, **options), make(4, 6, (3, 3), max_offset=6.0)
    params, x = fill(layer), normal(2, 5, 8, 4, seed=1)
    axes, shift = ((1, 2), (2, 3)) if "padding_mode" not in options or options["padding_mode"] == "wrap" else (2, 3)

    @jax.jit
    def both(params, x):
        rolled = jnp.roll(x, shift, axes)
        return [(each.apply(params, rolled), jnp.roll(each.apply(params, x), shift, axes)) for each in (layer, plain)]

    (actual, wanted), (broken, otherwise) = both(params, x)
    assert np.abs(jax.jit(layer.look)(params, x)["offset"]).mean() > 1.5
    assert_close(actual, wanted, 1e-5)
    assert np.abs(broken - otherwise).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"strides": 2}, marks=pytest.mark.slow),
        pytest.param({"kernel_dilation": 2}, marks=pytest.mark.slow),
        {"strides": (1, 2), "kernel_dilation": (2, 1)},
    ],
)
def test_without_offsets_it_is_flax_s_own_convolution(make, framework, padding, options):
    """And what the branch emits is what Flax's would, of the same padding."""
    x = normal(2, 7, 8, 4, seed=1)
    layer = make(4, 6, (3, 2), padding=padding, max_offset=0, modulated=False, **options)
    free = make(4, 6, (3, 2), padding=padding, modulated=False, **options)
    plain = make(4, 6, (3, 2), padding=padding, layer=PLAIN[framework], **options)
    branch = make(4, 12, (3, 2), padding=padding, layer=PLAIN[framework], **options)
    params = fill(layer)

    @jax.jit
    def all_four(p):
        main = {"kernel": p["kernel"], "bias": p["bias"]}
        emitted = free.look(p, x)["offset"], branch.apply(p["offset_conv"], x)
        return (layer.apply(p, x), plain.apply(main, x)), emitted

    for actual, wanted in all_four(params):
        assert_close(actual, wanted, 1e-5)


MODES = {"zeros": "constant", "edge": "edge", "wrap": "wrap", "reflect": "reflect", "symmetric": "symmetric"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "padding",
    [
        "SAME",
        pytest.param(((1, 2), (3, 0)), marks=pytest.mark.slow),
        ((-1, 3), (2, -2)),
        pytest.param("VALID", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_branch_reads_its_map_beyond_the_border_as_numpy_pads_it(make, mode, padding):
    """One axis of the mode and one of "edge", so that no axis is left to the convolution's own padding; stride 2."""
    options = {"strides": (1, 2), "kernel_dilation": (1, 2)}
    layer = make(4, 6, (3, 2), padding=padding, padding_mode=(mode, "edge"), modulated=False, **options)
    valid = make(4, 6, (3, 2), padding="VALID", modulated=False, **options)
    pads = {"SAME": ((1, 1), (0, 1)), "VALID": ((0, 0), (0, 0))}.get(padding, padding)
    padded = np.asarray(X)
    for axis, ((low, high), one) in enumerate(zip(pads, (mode, "edge"), strict=True), start=1):
        width = [(max(low, 0), max(high, 0)) if a == axis else (0, 0) for a in range(4)]
        kept = slice(max(-low, 0), -max(-high, 0) or None)
        padded = np.pad(padded, width, mode=MODES[one])[(slice(None),) * axis + (kept,)]
    actual, wanted = jax.jit(lambda p: (layer.look(p, X), valid.look(p, jnp.asarray(padded))))(fill(layer))
    assert_close(actual["offset"], wanted["offset"], 1e-5)


def test_zeros_are_left_to_the_convolution(make):
    """No copy of the map: with "zeros", the default, the branch pads as ever; with any other mode it is given padded maps."""
    programs = {}
    for mode in (None, "zeros", ("zeros", "zeros"), ("zeros", "edge")):
        layer = make(4, 6, (3, 3), **({} if mode is None else {"padding_mode": mode}))
        programs[mode] = str(jax.make_jaxpr(layer.look)(fill(layer), X))
    assert programs[None] == programs["zeros"] == programs["zeros", "zeros"]
    assert "padding=((1, 1), (1, 1))" in programs["zeros"]
    assert "padding=((0, 0), (0, 0))" in programs["zeros", "edge"]


# ---- symbolic sizes

GEOMETRIES = {
    "SAME": {},
    "SAME, stride 2": {"strides": 2},
    "explicit": {"padding": ((1, 2), (2, 3)), "kernel_dilation": (1, 2)},
    "explicit, stride 2": {"padding": 1, "strides": 2},
    "wrap": {"padding": "CIRCULAR"},
    "panorama, stride 2": {"padding_mode": ("symmetric", "wrap"), "strides": 2},
}


@pytest.mark.parametrize(
    "name", [name if name == "SAME, stride 2" else pytest.param(name, marks=pytest.mark.slow) for name in GEOMETRIES]
)
def test_an_exported_layer_takes_any_size(make, name):
    """Batch, height and width unknown, written down and read again; "SAME" for all platforms at once."""
    layer = make(4, 6, (3, 3), max_offset=(2.0, None), **GEOMETRIES[name])
    params = fill(layer)
    shape = jax.ShapeDtypeStruct((*export.symbolic_shape("b, h, w"), 4), jnp.float32)
    platforms = ("cpu", "cuda", "tpu") if name == "SAME" else ("cpu",)
    exported = export.export(jax.jit(lambda x: layer.apply(params, x)), platforms=platforms)(shape)
    loaded = export.deserialize(exported.serialize())
    assert loaded.platforms == platforms
    for size in ((1, 5, 6), (3, 4, 4), (2, 9, 7)):
        x = normal(*size, 4, seed=sum(size))
        assert_close(loaded.call(x), jax.jit(layer.apply)(params, x), 1e-5)


@pytest.mark.slow
def test_an_exported_layer_takes_offsets_and_flow_of_any_size(make):
    """Two arrays of unknown sizes, the same in both."""
    layer = make(4, 6, (3, 3))
    params, sizes = fill(layer), export.symbolic_shape("b, h, w")
    shapes = [jax.ShapeDtypeStruct((*sizes, channels), jnp.float32) for channels in (4, 2, 18)]

    def both(x, flow, offset):
        return layer.apply(params, x, base_offset=flow), layer.apply(params, x, offset)

    loaded = export.deserialize(export.export(jax.jit(both))(*shapes).serialize())
    for size in ((1, 5, 6), (2, 4, 9)):
        arrays = [normal(*size, channels, seed=i) for i, channels in enumerate((4, 2, 18))]
        for actual, wanted in zip(loaded.call(*arrays), jax.jit(both)(*arrays), strict=True):
            assert_close(actual, wanted, 1e-5)
