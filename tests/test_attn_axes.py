"""MSDeformAttn over maps of one and three axes, and with queries that several maps share: against NumPy in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import attn, oracle

pytestmark = pytest.mark.lenient
frameworks = pytest.mark.parametrize("framework", attn.FRAMEWORKS)
LEVELS = {1: ((7,), (4,)), 2: ((3, 4), (2, 2)), 3: ((2, 3, 4), (1, 2, 2))}
MADE = {"embed_dim": 8, "num_heads": 2, "num_levels": 2}


def make(framework, axes, **options):
    """The layer's fresh parameters, the layer as a function of parameters and arguments, and what it sows."""
    return attn.FRAMEWORKS[framework](**(MADE | {"num_axes": axes} | options))


def pixels(axes):
    return sum(int(np.prod(shape)) for shape in LEVELS[axes])


def filled(axes, points=(2, 3), seed=0):
    """Parameters by the published names."""
    rng = np.random.default_rng(seed)
    total = 2 * sum(points)
    features = {"sampling_offsets": axes * total, "attention_weights": total, "value_proj": 8, "output_proj": 8}
    return {
        name: {"kernel": rng.normal(0, 0.5, (8, out)), "bias": rng.normal(0, 0.5, out)}
        for name, out in features.items()
    }


def draw(axes, coordinates, *, batch=(2,), shared=None, queries=3, seed=1):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(*(batch if shared is None else shared), queries, 8))
    reference = rng.uniform(0.1, 0.9, size=(*batch, queries, 2, coordinates))
    return query, reference, rng.normal(size=(*batch, pixels(axes), 8))


def by_hand(axes, points, params, query, reference, value):
    """The layer for one image: loops over heads, levels and points, in float64."""

    def project(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    queries, value = len(query), project("value_proj", value).reshape(-1, 2, 4)
    offset = project("sampling_offsets", query).reshape(queries, 2, sum(points), axes)
    logits = np.exp(project("attention_weights", query).reshape(queries, 2, sum(points)))
    weights = logits / logits.sum(-1, keepdims=True)
    y, first, point = np.zeros((queries, 2, 4)), 0, 0
    for level, (shape, count) in enumerate(zip(LEVELS[axes], points, strict=True)):
        size = np.array(shape[::-1])  # x first
        rows = value[first : first + size.prod()]
        first += size.prod()
        for _ in range(count):
            for head in range(2):
                at = reference[:, level, :axes]
                step = 1 / size if reference.shape[-1] == axes else reference[:, level, axes:] / (2 * count)
                pixel = (at + offset[:, head, point] * step) * size - 0.5
                read = oracle.linear_sample(rows[:, head].reshape(*shape, 4), pixel[:, ::-1])
                y[:, head] += weights[:, head, point, None] * read
            point += 1
    return project("output_proj", y.reshape(queries, 8))


@pytest.mark.parametrize(
    ("framework", "axes", "coordinates"),
    [("linen", 1, 1), ("nnx", 1, 2), ("nnx", 2, 4), ("nnx", 3, 3), ("linen", 3, 6)],
)
def test_maps_of_one_two_and_three_axes(framework, axes, coordinates, x64):
    """Points and boxes, on levels that differ in their points."""
    points = (2, 3)
    _, apply, look = make(framework, axes, num_points=points, param_dtype=jnp.float64)
    params, arguments = filled(axes, points), draw(axes, coordinates)
    y, seen = jax.jit(lambda p, *a: (apply(p, *a, LEVELS[axes]), look(p, *a, LEVELS[axes])))(params, *arguments)
    wanted = [by_hand(axes, points, params, *image) for image in zip(*arguments, strict=True)]
    np.testing.assert_allclose(y, wanted, rtol=1e-11, atol=1e-12)
    assert seen["sampling_locations"].shape == (2, 3, 2, 5, axes)


@pytest.mark.parametrize(("framework", "shared"), [("nnx", ()), ("linen", (2, 1))])
def test_one_set_of_queries_for_all_cameras(framework, shared, x64):
    """Reference points and maps of their own; the gradient is the sum over the cameras."""
    batch = (2, 3) if len(shared) == 2 else (3,)
    _, apply, _ = make(framework, 2, num_points=(2, 3), param_dtype=jnp.float64)
    params, (query, reference, value) = filled(2), draw(2, 2, batch=batch, shared=shared)
    whole = np.broadcast_to(query, (*batch, 3, 8))

    @jax.jit
    def run(query):
        y, pull = jax.vjp(lambda query: apply(params, query, reference, value, LEVELS[2]), query)
        return y, pull(y)[0]

    (y, gradient), (y_of_whole, each) = run(query), run(whole)
    np.testing.assert_allclose(y, y_of_whole, rtol=1e-12)
    for camera in np.ndindex(*batch):
        wanted = by_hand(2, (2, 3), params, whole[camera], reference[camera], value[camera])
        np.testing.assert_allclose(y[camera], wanted, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gradient, each.sum(-3).reshape(query.shape), rtol=1e-10, atol=1e-12)


def test_a_fresh_layer_looks_every_way():
    """Over one axis right and left; over three each head in its own direction, on the surface of a cube."""
    bias = jax.jit(make("nnx", 1, num_points=2)[0])()["sampling_offsets"]["bias"]
    np.testing.assert_array_equal(bias, [1, 2, 1, 2, -1, -2, -1, -2])
    bias = jax.jit(make("nnx", 3, num_points=2, num_heads=8)[0])()["sampling_offsets"]["bias"].reshape(8, 2, 2, 3)
    np.testing.assert_allclose(np.abs(bias).max(-1), np.broadcast_to([1, 2], (8, 2, 2)), rtol=1e-6)
    unit = bias[:, 0, 0] / np.linalg.norm(bias[:, 0, 0], axis=-1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(8, dtype=bool)]
    assert cosines.max() < 0.7  # no two look the same way
    assert np.abs(unit.sum(0)).max() < 1  # and all together none


@frameworks
@pytest.mark.parametrize(
    ("axes", "change", "message"),
    [
        (1, {"spatial_shapes": ((7, 1), (4, 1))}, "spatial_shapes=((7, 1), (4, 1)) has 2 levels of 2 sizes; wanted (length) for each"),
        (3, {"spatial_shapes": ((6, 4), (2, 2))}, "has 2 levels of 2 sizes; wanted (depth, height, width) for each of num_levels=2"),
        (3, {"reference_points": np.zeros((2, 3, 2, 2))}, "wanted (2, 3, 2, '3 or 6'): (x, y, z) or (x, y, z, width, height, depth) for each"),
        (1, {"reference_points": np.zeros((2, 3, 2, 3))}, "wanted (2, 3, 2, '1 or 2'): (x) or (x, length) for each"),
        (2, {"query": np.zeros((3, 3, 8))}, "query has shape (3, 3, 8); wanted (*batch, Q, 8): the batch axes of value, (2,), of which any may be 1"),
        (4, {}, "num_axes=4; wanted 1, 2 or 3: the spatial axes of the maps"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(framework, axes, change, message):
    def trace():
        _, apply, _ = make(framework, axes, num_points=(2, 3))
        query, reference, value = draw(min(axes, 3), min(axes, 3))
        given = {"query": query, "reference_points": reference, "value": value, "spatial_shapes": LEVELS[min(axes, 3)]}
        jax.eval_shape(lambda params: apply(params, *(given | change).values()), filled(min(axes, 3)))

    with pytest.raises(ValueError, match=re.escape(message)):
        trace()
