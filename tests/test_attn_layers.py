"""MSDeformAttn, linen and nnx alike: torch's numbers, the published start, padding, errors."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import ms_deform_attn
from tests.support import attn
from tests.support.programs import collectives
from tests.support.running import assert_close

pytestmark = pytest.mark.lenient
frameworks = pytest.mark.parametrize("framework", attn.FRAMEWORKS)


def make(framework, **options):
    return attn.FRAMEWORKS[framework](**options)


def filled(init, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), jax.eval_shape(init))


# ---- values


@frameworks
@pytest.mark.parametrize("case", attn.CASES)
def test_torch_computes_the_same_with_the_same_gradients(framework, case, x64):
    init, apply, _ = make(framework, **attn.options(case))
    params, inputs = attn.params(case), attn.stored(case, *attn.INPUTS)
    assert jax.tree.map(jnp.shape, jax.eval_shape(init)) == jax.tree.map(jnp.shape, params)

    def run(params, inputs, cotangent):
        y, pull = jax.vjp(lambda *inputs: apply(params, *inputs, attn.LEVELS, attn.padding_mask(case)), *inputs)
        return [y, *pull(cotangent)]

    results = jax.jit(run)(params, inputs, *attn.stored(case, "cotangent"))
    names = ["y", *(f"d_{name}" for name in attn.INPUTS)]
    for name, result, expected in zip(names, results, attn.stored(case, *names), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-11, atol=1e-12, err_msg=name)


@frameworks
def test_a_fresh_layer_is_the_published_one(framework):
    """Projections of Xavier's, branches of zeros but for a direction for each head."""
    init, _, _ = make(framework, embed_dim=64, num_heads=8, num_levels=2, num_points=4)
    params = jax.jit(init)()
    for name in ("sampling_offsets", "attention_weights"):
        assert not params[name]["kernel"].any()
    assert not params["attention_weights"]["bias"].any()
    bound = (6 / 128) ** 0.5
    for name in ("value_proj", "output_proj"):
        assert 0.95 * bound < jnp.abs(params[name]["kernel"]).max() <= bound
        assert not params[name]["bias"].any()
    square = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    wanted = [[[(p * x, p * y) for p in (1, 2, 3, 4)]] * 2 for x, y in square]  # (M, L, P, 2)
    np.testing.assert_allclose(params["sampling_offsets"]["bias"], np.float32(wanted).ravel(), atol=1e-6)


@frameworks
def test_initializers_of_one_s_own(framework):
    ones, twos = jax.nn.initializers.ones, jax.nn.initializers.constant(2)
    own = {"offset_bias_init": ones, "offset_kernel_init": twos, "attention_bias_init": twos, "kernel_init": ones}
    params = jax.jit(make(framework, **own)[0])()
    assert {name: {kind: set(np.ravel(p)) for kind, p in layer.items()} for name, layer in params.items()} == {
        "sampling_offsets": {"bias": {1}, "kernel": {2}},
        "attention_weights": {"bias": {2}, "kernel": {0}},
        "value_proj": {"bias": {0}, "kernel": {1}},
        "output_proj": {"bias": {0}, "kernel": {1}},
    }


def test_directions_of_other_heads_and_points():
    init, _, _ = make("nnx", embed_dim=6, num_heads=3, num_levels=3, num_points=(1, 3, 2))
    bias = np.reshape(jax.jit(init)()["sampling_offsets"]["bias"], (3, 6, 2))
    np.testing.assert_allclose(np.abs(bias).max(-1), np.broadcast_to([1, 1, 2, 3, 1, 2], (3, 6)), rtol=1e-6)
    angles = np.arctan2(bias[..., 1], bias[..., 0]) % (2 * np.pi)
    np.testing.assert_allclose(angles, np.broadcast_to([[0], [2 * np.pi / 3], [4 * np.pi / 3]], (3, 6)), rtol=1e-5)


@frameworks
@pytest.mark.parametrize("coordinates", [2, 4])
def test_what_is_sown_is_what_was_used(framework, coordinates):
    init, apply, look = make(framework)
    params, (query, points, value) = filled(init), attn.draw(coordinates)
    seen = jax.jit(lambda *args: look(params, *args, attn.LEVELS))(query, points, value)
    assert {name: array.shape for name, array in seen.items()} == {
        "sampling_locations": (2, 5, 2, 3, 2, 2),
        "sampling_weights": (2, 5, 2, 3, 2),
    }
    np.testing.assert_allclose(seen["sampling_weights"].sum((-1, -2)), 1, rtol=1e-6)
    projected = value @ params["value_proj"]["kernel"] + params["value_proj"]["bias"]
    y = ms_deform_attn(projected.reshape(2, -1, 2, 4), attn.LEVELS, *seen.values())
    y = y @ params["output_proj"]["kernel"] + params["output_proj"]["bias"]
    assert_close(jax.jit(lambda *args: apply(params, *args, attn.LEVELS))(query, points, value), y, 1e-5)


def test_a_fresh_box_s_points_lie_on_a_square_within_it():
    init, _, look = make("nnx", num_points=4)
    query, _, value = attn.draw()
    boxes = jnp.broadcast_to(jnp.array([0.4, 0.6, 0.2, 0.1]), (2, 5, 3, 4))
    seen = jax.jit(lambda: look(init(), query, boxes, value, attn.LEVELS))()
    locations = seen["sampling_locations"]
    # head 0 looks right, head 1 left, up to the box's edges
    wanted = [[[0.4 + sign * 0.1 * p / 4, 0.6] for p in (1, 2, 3, 4)] for sign in (1, -1)]
    np.testing.assert_allclose(locations[0, 0, :, 1], wanted, rtol=1e-5)


def test_levels_that_differ_in_points_by_name_alone():
    """(P, …, P) is P: the same parameters, the points one after another."""
    (init, apply, look), (_, listed, look_listed) = make("nnx"), make("nnx", num_points=(2, 2, 2))
    params, arguments = filled(init), (*attn.draw(), attn.LEVELS)
    ways = apply, listed, look, look_listed
    y, other, seen, flat = jax.jit(lambda params: [way(params, *arguments) for way in ways])(params)
    np.testing.assert_array_equal(other, y)
    for name, array in seen.items():
        np.testing.assert_array_equal(flat[name], array.reshape(flat[name].shape))


@frameworks
def test_what_is_padding_is_not_seen(framework):
    """Its projected value is zero, bias included, whatever stands there."""
    init, apply, _ = make(framework)
    params, (query, points, value) = filled(init), attn.draw()
    padding = np.random.default_rng(1).uniform(size=value.shape[:-1]) < 0.5
    run = jax.jit(lambda value, padding: apply(params, query, points, value, attn.LEVELS, padding))
    unseen = np.where(padding[..., None], np.nan, value)
    np.testing.assert_array_equal(run(unseen, padding), run(value, padding))
    everything = run(value, np.ones_like(padding))
    np.testing.assert_allclose(everything, np.broadcast_to(params["output_proj"]["bias"], everything.shape), atol=1e-6)


def test_the_method_is_the_op_s():
    (init, _, look), (_, discrete, _) = make("nnx"), make("nnx", method="discrete")
    params, (query, points, value) = filled(init), attn.draw()
    seen, y = jax.jit(lambda *args: [way(*args, attn.LEVELS) for way in (look, discrete)])(params, query, points, value)
    projected = value @ params["value_proj"]["kernel"] + params["value_proj"]["bias"]
    wanted = ms_deform_attn(projected.reshape(2, -1, 2, 4), attn.LEVELS, *seen.values(), method="discrete")
    wanted = wanted @ params["output_proj"]["kernel"] + params["output_proj"]["bias"]
    assert_close(y, wanted, 1e-5)


def test_reference_points_of_all_images_and_levels():
    """A batch axis that is missing or 1 and an axis of levels of 1 stand for all."""
    init, apply, _ = make("nnx")
    apply = jax.jit(apply, static_argnums=4)
    params, (query, points, value) = filled(init), attn.draw()
    points = points[:1, :, :1]
    whole = apply(params, query, np.broadcast_to(points, (2, 5, 3, 2)), value, attn.LEVELS)
    for given in (points, points[0]):
        np.testing.assert_array_equal(apply(params, query, given, value, attn.LEVELS), whole)


@pytest.mark.parametrize("batch", [(), pytest.param((2, 3), marks=pytest.mark.slow)])
def test_any_batch_axes(batch):
    init, apply, _ = make("nnx")
    apply = jax.jit(apply, static_argnums=4)
    params, inputs = filled(init), attn.draw(batch=batch)
    flat = [array.reshape(-1, *array.shape[len(batch) :]) for array in inputs]
    y = apply(params, *inputs, attn.LEVELS)
    assert_close(y, apply(params, *flat, attn.LEVELS).reshape(y.shape), 1e-6)


@frameworks
def test_half_precision_keeps_locations_and_weights_wide(framework):
    init, apply, look = make(framework, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = filled(init)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    query, points, value = (jnp.asarray(a, d) for a, d in zip(attn.draw(), ("bfloat16", "f4", "bfloat16"), strict=True))
    arguments = params, query, points, value
    assert jax.eval_shape(lambda *a: apply(*a, attn.LEVELS), *arguments).dtype == jnp.bfloat16
    seen = jax.eval_shape(lambda *a: look(*a, attn.LEVELS), *arguments)
    assert {array.dtype for array in seen.values()} == {jnp.dtype(jnp.float32)}
    program = str(jax.make_jaxpr(lambda *a: apply(*a, attn.LEVELS))(*arguments))
    for features, dtype in ((24, "f32"), (12, "f32"), (8, "bf16")):
        assert f"{dtype}[2,5,{features}] = dot_general" in program


@pytest.mark.slow
def test_symbolic_sizes():
    """Batch, queries and the maps' sizes."""
    init, apply, _ = make("nnx")
    params, levels = filled(init), [(1, 1), *attn.LEVELS[1:]]

    def attend(query, points, image, rest):
        levels[0] = image.shape[1:3]
        value = jnp.concatenate([image.reshape(image.shape[0], -1, 8), rest], axis=1)
        return apply(params, query, points, value, levels)

    b, q, h, w = jax.export.symbolic_shape("b, q, h, w")
    shapes = [(b, q, 8), (b, q, 3, 2), (b, h, w, 8), (b, 9, 8)]
    exported = jax.export.export(jax.jit(attend))(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    query, points, value = attn.draw()
    (height, width), *_ = attn.LEVELS
    image, rest = np.split(value, [height * width], axis=1)
    y = exported.call(query, points, image.reshape(2, height, width, 8), rest)
    assert_close(y, apply(params, query, points, value, attn.LEVELS), 1e-6)


@pytest.mark.slow
def test_a_split_batch_asks_for_the_sums_of_gradients_alone():
    init, apply, _ = make("nnx")
    params, inputs = filled(init), attn.draw(batch=(8,))
    padding = np.zeros(inputs[2].shape[:-1], bool)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    arguments = jax.device_put((*inputs, padding), split)

    def forward(params, query, points, value, padding):
        return apply(params, query, points, value, attn.LEVELS, padding)

    def gradient(*arguments):
        return jax.grad(lambda *a: (forward(*a, padding=arguments[-1]) ** 2).sum(), (0, 1, 2, 3))(*arguments[:-1])

    def program(f, shardings):
        return jax.jit(f, out_shardings=shardings).lower(jax.device_put(params, whole), *arguments).compile().as_text()

    assert collectives(program(forward, split)) == []
    sums = collectives(program(gradient, (whole, split, split, split)))
    assert {opcode for opcode, _, _ in sums} == {"all-reduce"}
    summed = sorted(math.prod(shape) for _, shapes, _ in sums for shape in shapes)
    assert summed == sorted(p.size for p in jax.tree.leaves(params))


# ---- errors


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GOOD = {
    "query": zeros(2, 5, 8),
    "reference_points": zeros(2, 5, 3, 2),
    "value": zeros(2, attn.PIXELS, 8),
    "spatial_shapes": attn.LEVELS,
    "padding_mask": None,
}


@frameworks
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads=3 must divide embed_dim=8"),
        ({"num_heads": "2"}, TypeError, "num_heads='2' is a str; wanted an int"),
        ({"num_points": 0}, ValueError, "num_points=0 is too small"),
        ({"num_points": (2, 2)}, ValueError, "num_points=(2, 2); wanted 3 ints of at least 1, one per level"),
        ({"num_points": 2.5}, TypeError, "num_points=2.5 is not made of ints"),
        ({"method": "bilinear"}, ValueError, "method='bilinear' is not known; wanted one of"),
        ({"implementation": "pallas_gpu"}, ValueError, "implementation='pallas_gpu' is not there for ms_deform_attn"),
    ],
)
def test_options_that_do_not_fit(framework, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda: make(framework, **options)[1](make(framework, **options)[0](), *GOOD.values()))


@frameworks
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": zeros(2, 5, 7)}, ValueError, "query has shape (2, 5, 7); wanted (*batch, Q, 8): the batch axes of value, (2,)"),
        ({"query": zeros(3, 5, 8)}, ValueError, "query has shape (3, 5, 8)"),
        ({"query": zeros(2, 5, 8, dtype=np.int32)}, TypeError, "query has dtype int32"),
        ({"value": zeros(2, 20, 8)}, ValueError, "value has shape (2, 20, 8); wanted (*batch, 29, 8): the pixels of all levels one after another, as spatial_shapes=((5, 4), (3, 2), (1, 3)) has them"),
        ({"value": zeros(2, 29, 4)}, ValueError, "and embed_dim channels"),
        ({"spatial_shapes": ((5, 4), (3, 2), (1, 4))}, ValueError, "value has shape (2, 29, 8); wanted (*batch, 30, 8)"),
        ({"spatial_shapes": ((5, 4), (3, 3))}, ValueError, "spatial_shapes=((5, 4), (3, 3)) has 2 levels of 2 sizes; wanted (height, width) for each of num_levels=3"),
        ({"spatial_shapes": ((29,), (1,), (1,))}, ValueError, "has 3 levels of 1 sizes"),
        ({"spatial_shapes": jnp.ones((3, 2), int)}, TypeError, "as ints that are known when the function is traced"),
        ({"reference_points": zeros(2, 5, 3, 3)}, ValueError, "reference_points has shape (2, 5, 3, 3); wanted (2, 5, 3, '2 or 4'): (x, y) or (x, y, width, height) for each query and each of num_levels=3"),
        ({"reference_points": zeros(2, 5, 2, 2)}, ValueError, "reference_points has shape (2, 5, 2, 2)"),
        ({"reference_points": zeros(2, 5, 2)}, ValueError, "reference_points has shape (2, 5, 2)"),
        ({"reference_points": zeros()}, ValueError, "reference_points has shape ()"),
        ({"reference_points": zeros(2, 1, 3, 2)}, ValueError, "reference_points has shape (2, 1, 3, 2)"),
        ({"reference_points": zeros(3, 5, 3, 2)}, ValueError, "reference_points has shape (3, 5, 3, 2)"),
        ({"reference_points": zeros(1, 2, 5, 3, 2)}, ValueError, "reference_points has shape (1, 2, 5, 3, 2)"),
        ({"padding_mask": zeros(2, 29)}, TypeError, "padding_mask is a ndarray of dtype float32; wanted an array of bools, True where a pixel is padding"),
        ({"padding_mask": [True] * 29}, TypeError, "padding_mask is a list"),
        ({"padding_mask": zeros(2, 28, dtype=bool)}, ValueError, "padding_mask has shape (2, 28); wanted (2, 29): one bool for each pixel of value"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(framework, change, error, message):
    init, apply, _ = make(framework)
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda params: apply(params, *(GOOD | change).values()), jax.eval_shape(init))
