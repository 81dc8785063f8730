"""MSDeformAttn in ONNX: points and boxes, levels that differ, every method, open sizes, padding."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dcn_jax import ms_deform_attn
from dcn_jax.nnx import MSDeformAttn
from tests.support.onnx_models import check, checked, filled, operators

pytestmark = pytest.mark.lenient

LEVELS = ((4, 5), (3, 2), (1, 3))
PIXELS = sum(height * width for height, width in LEVELS)
OPEN = {"query": (None, None, 8), "reference_points": (None, "queries", 3, 2), "value": (None, PIXELS, 8)}


def attention(**options):
    """Points lie up to a few pixels around their reference."""
    sizes = {"embed_dim": 8, "num_heads": 2, "num_levels": 3, "num_points": 2}
    return filled(lambda rngs: MSDeformAttn(**(sizes | options), rngs=rngs), scale=0.8)


def draw(batch=2, queries=5, *, reference=(3, 2), low=-0.4, high=1.4, seed=0):
    """Arguments of a call; references lie outside of the maps too."""
    rng = np.random.default_rng(seed)
    shape = (batch, queries, *reference) if reference[0] != "shared" else (queries, *reference[1:])
    points = rng.uniform(low, high, shape)
    points[..., 2:] = rng.uniform(0.1, 0.8, points[..., 2:].shape)
    query, value = rng.normal(size=(batch, queries, 8)), rng.normal(size=(batch, PIXELS, 8))
    arguments = {"query": query, "reference_points": points, "value": value}
    return {name: array.astype(np.float32) for name, array in arguments.items()}


def check_layer(model, shapes, *inputs, **options):
    proto = checked(model, shapes, constants={"spatial_shapes": LEVELS}, **options)
    check(proto, functools.partial(model, spatial_shapes=LEVELS), *inputs)
    return proto


CASES = {
    "linear": ({}, (3, 2)),
    "nearest": ({"method": "nearest"}, (3, 2)),
    "discrete": ({"method": "discrete"}, (3, 2)),
    "boxes, points that differ": ({"num_points": (1, 3, 2)}, (3, 4)),
    "discrete, points that differ": ({"num_points": (3, 1, 2), "method": "discrete"}, (1, 2)),
    "one reference for all levels": ({}, (1, 4)),
    "one for all images": ({}, ("shared", 3, 2)),
}


ALWAYS = ("linear", "discrete, points that differ", "one reference for all levels")  # the others are slow together


@pytest.mark.parametrize(
    ("options", "reference"),
    [pytest.param(*CASES[name], id=name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in CASES],
)
def test_the_layer_over_open_sizes(options, reference):
    model, arguments = attention(**options), draw(reference=reference)
    points = arguments["reference_points"].shape
    open_points = (None, "queries", *points[2:]) if len(points) == 4 else ("queries", *points[1:])
    other = draw(1, 3, reference=reference, seed=1)
    proto = check_layer(model, OPEN | {"reference_points": open_points}, arguments, other)
    assert [given.name for given in proto.graph.input] == ["query", "reference_points", "value"]
    assert ("GridSample" in operators(proto)) is (model.method != "discrete")


def test_padding_and_known_sizes():
    arguments = draw()
    padding = np.random.default_rng(3).uniform(size=(2, PIXELS)) < 0.4
    shapes = {name: array.shape for name, array in arguments.items()} | {"padding_mask": padding.shape}
    proto = check_layer(attention(), shapes, arguments | {"padding_mask": padding})
    assert "Shape" not in operators(proto)  # every size is known


@pytest.mark.parametrize("reference", [(3, 2), ("shared", 3, 2)], ids=["its own points", "shared points"])
def test_queries_that_images_share(reference):
    """One set of queries for all images, as for several cameras."""
    model, arguments = attention(), draw(reference=reference)
    arguments["query"] = arguments["query"][0]
    shapes = OPEN | {"query": (5, 8), "reference_points": arguments["reference_points"].shape}
    proto = checked(model, shapes, constants={"spatial_shapes": LEVELS})

    def alone(query, **others):
        return model(jnp.broadcast_to(query, (2, 5, 8)), **others, spatial_shapes=LEVELS)

    check(proto, alone, arguments, reference=False)


def test_reference_points_that_stay_the_same():
    model, arguments = attention(), draw(1)
    points = arguments.pop("reference_points")[0]
    constants = {"spatial_shapes": LEVELS, "reference_points": points}
    proto = checked(model, {"query": (None, 5, 8), "value": (None, None, 8)}, constants=constants)
    check(proto, functools.partial(model, **constants), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("shapes", [((7,), (3,)), ((2, 3, 4), (1, 2, 2))], ids=["1-D", "3-D"])
@pytest.mark.parametrize("method", ["linear", "discrete"])
def test_the_op_over_one_and_three_axes(shapes, method):
    rng, rank = np.random.default_rng(0), len(shapes[0])
    pixels = sum(map(np.prod, shapes))
    given = {
        "value": rng.normal(size=(2, pixels, 2, 3)),
        "sampling_locations": rng.uniform(-0.3, 1.3, size=(2, 4, 2, 2, 3, rank)),
        "attention_weights": rng.normal(size=(2, 4, 2, 2, 3)),
    }
    given = {name: array.astype(np.float32) for name, array in given.items()}
    constants = {"spatial_shapes": shapes, "method": method}
    proto = checked(ms_deform_attn, {name: array.shape for name, array in given.items()}, constants=constants)
    check(proto, functools.partial(ms_deform_attn, **constants), given)
