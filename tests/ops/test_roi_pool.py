"""`roi_align` and `deform_roi_pool`: others' numbers, the oracle's, boxes of every kind, transformations, errors."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from dcn_jax import deform_roi_pool, roi_align
from tests.support import roi_oracle
from tests.support.programs import collectives
from tests.support.running import assert_close, value_and_gradients

STORED = np.load(Path(__file__).parents[1] / "support" / "data" / "roi.npz")
OPTIONS = json.loads(str(STORED["options"]))
F32 = np.float32


# ---- values


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_torchvision_computes_the_same(number, x64):
    """`roi_align` and its gradient, for boxes of every kind, to the last digits."""
    x, rois, y, cotangent, d_x = (STORED[f"{number}.{name}"] for name in ("x", "rois", "y", "cotangent", "d_x"))
    f = functools.partial(roi_align, rois=rois, **OPTIONS[number])
    found, (gradient,) = jax.jit(functools.partial(value_and_gradients, f))((x,), cotangent)
    assert_close(found, y, 1e-14)
    assert_close(gradient, d_x, 1e-14)


# The cases of mmcv's tests/test_ops/test_deform_roi_pool.py, whose layers are new: x of one image (C, H, W), the box's end,
# the result, and the gradient of its sum. Bins 2×2, 2×2 samples.
RAMP, FALL = [[1.0, 2], [3, 4]], [[4.0, 3], [2, 1]]
SUM = [[3.0625, 0.4375], [0.4375, 0.0625]]
EDGES = [[0.47265625, 0.4296875, 0.4296875, 0.04296875]] + 2 * [[0.4296875, 0.390625, 0.390625, 0.0390625]]
MMCV = [
    ([RAMP], 1, [[[1, 1.25], [1.5, 1.75]]], [SUM]),
    ([RAMP, FALL], 1, [[[1, 1.25], [1.5, 1.75]], [[4, 3.75], [3.5, 3.25]]], [SUM, SUM]),
    (
        [[[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]],
        3,
        [[[1.9375, 4.75], [7.5625, 10.375]]],
        [[*EDGES, [0.04296875, 0.0390625, 0.0390625, 0.00390625]]],
    ),
]


@pytest.mark.parametrize("case", MMCV)
def test_mmcv_publishes_the_same(case, x64):
    maps, end, y, d_x = case
    x, rois = np.moveaxis(np.array(maps), 0, -1)[None], np.array([[0.0, 0, 0, end, end]])
    offset = np.zeros((1, 2, 2, 2))
    f = functools.partial(deform_roi_pool, output_size=2)
    found, (gradient, *_) = jax.jit(functools.partial(value_and_gradients, f))(
        (x, rois, offset), np.ones((1, 2, 2, x.shape[-1]))
    )
    np.testing.assert_allclose(np.moveaxis(found[0], -1, 0), y, rtol=1e-14)
    np.testing.assert_allclose(np.moveaxis(gradient[0], -1, 0), d_x, rtol=1e-14)


CASES = [
    {"output_size": (3, 4), "spatial_scale": 0.5, "gamma": 0.3, "aligned": False},
    {"output_size": (2, 3), "sampling_ratio": 2},
    pytest.param({"output_size": (3, 3), "spatial_scale": 0.5, "sampling_ratio": 3}, marks=pytest.mark.slow),
    pytest.param({"output_size": (1, 1), "sampling_ratio": 1}, marks=pytest.mark.slow),
    pytest.param({"output_size": (5, 4), "spatial_scale": 0.7, "sampling_ratio": 1}, marks=pytest.mark.slow),
    pytest.param({"output_size": (2, 1), "sampling_ratio": 5, "gamma": -1.0}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_oracle_computes_the_same(options, x64):
    """The result and the gradients of the map, the boxes, the offsets and the mask."""
    arrays = roi_oracle.draw(output_size=options["output_size"])
    arrays[1][:, 1:] /= options.get("spatial_scale", 1)
    arrays[1][1, :3], arrays[1][2, 3:] = arrays[1][1, [0, 3, 4]], arrays[1][2, 1:3]  # two boxes end where they begin
    cotangent = np.random.default_rng(1).standard_normal((len(arrays[1]), *options["output_size"], arrays[0].shape[-1]))
    y, gradients = roi_oracle.pool(*arrays, cotangent, **options)
    f = functools.partial(deform_roi_pool, **options)
    found, found_gradients = jax.jit(functools.partial(value_and_gradients, f))(arrays, cotangent)
    assert_close(found, y, 1e-13)
    for gradient, wanted in zip(found_gradients, gradients, strict=True):
        assert_close(gradient, wanted, 1e-12)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_narrow_dtypes(dtype):
    """Positions are computed in float32 whatever the dtype of x."""
    x, *rest = roi_oracle.draw(dtype=F32)
    x = jnp.asarray(x, dtype)
    y, gradients = jax.jit(
        functools.partial(value_and_gradients, functools.partial(deform_roi_pool, output_size=(3, 4)))
    )((x, *rest), np.ones((6, 3, 4, 3), F32))
    wanted, exact = roi_oracle.pool(np.float64(x), *rest, np.ones((6, 3, 4, 3)), output_size=(3, 4))
    assert [a.dtype for a in (y, *gradients)] == [dtype, dtype, F32, F32, F32]
    tolerance = 2e-6 if dtype == jnp.float32 else 4e-3
    for found, right in zip((y, *gradients), (wanted, *exact), strict=True):
        assert_close(np.float64(found), right, tolerance)


@pytest.mark.parametrize("given", ["offset", "mask"])
def test_either_may_be_left_out(given):
    x, rois, offset, mask = roi_oracle.draw(dtype=F32)
    f, g = functools.partial(deform_roi_pool, output_size=(3, 4)), roi_oracle.pool
    some = {given: {"offset": offset, "mask": mask}[given]}
    assert_close(jax.jit(f)(x, rois, **some), g(x, rois, **some, output_size=(3, 4))[0], 2e-6)


# ---- boxes of every kind


X = np.random.default_rng(3).uniform(1, 2, (2, 4, 5, 1)).astype(F32)  # positive: a bin that reads the map is not zero
GOOD = [1, 0.3, 0.4, 4.1, 3.2]
INF, NAN = np.inf, np.nan
ZERO = {
    "index too large": [2, 0, 0, 3, 3],
    "index below zero": [-1, 0, 0, 3, 3],
    "index far off": [1e30, 0, 0, 3, 3],
    "infinite index": [INF, 0, 0, 3, 3],
    "outside": [0, 20, 20, 30, 30],
    "far outside": [0, 1e30, 1e30, 1e31, 1e31],
    "as wide as float32": [0, -3e38, -3e38, 3e38, 3e38],
    "infinite": [0, -INF, 0, INF, 3],
    "infinite end": [0, 0, 0, 3, INF],
}
FINITE = {
    "reversed": [0, 3.1, 3.3, 1, 1.2],
    "a point": [0, 2, 2, 2, 2],
    "a line": [0, 1, 2, 4, 2],
    "partly outside": [0, -9, -9, 4, 4],
    "the border": [0, -0.5, -0.5, -0.5, -0.5],
}


POOL = functools.partial(deform_roi_pool, output_size=(3, 4))


def pool_with_gradients(rois, offset=None):
    """`(y, gradients of x, the boxes and the offsets)`."""
    rois = np.array(rois, F32)
    offset = np.zeros((len(rois), 3, 4, 2), F32) if offset is None else offset
    run = jax.jit(functools.partial(value_and_gradients, POOL))
    return run((X, rois, offset), np.ones((len(rois), 3, 4, 1), F32))


def test_bad_boxes():
    """Each box beside a good one: none disturbs another, forward or backward, and none makes a NaN."""
    y, gradients = pool_with_gradients([GOOD, *ZERO.values(), *FINITE.values()])
    d_x, d_rois, _ = gradients
    zeros, rest = slice(1, 1 + len(ZERO)), [0, *range(1 + len(ZERO), len(y))]
    assert not y[zeros].any()
    assert not d_rois[zeros].any()
    assert all(np.isfinite(array).all() for array in (y, *gradients))
    rois = np.array([GOOD, *FINITE.values()])
    wanted, (exact, exact_rois, _, _) = roi_oracle.pool(
        X, rois, cotangent=np.ones((len(rois), 3, 4, 1)), output_size=(3, 4)
    )
    for found, right in ((y[np.array(rest)], wanted), (d_x, exact), (d_rois[np.array(rest)], exact_rois)):
        assert_close(found, right, 1e-5)


def test_a_nan_stays_in_its_box():
    bad = [[NAN if i == place else value for i, value in enumerate(GOOD)] for place in range(5)]
    y, (d_x, d_rois, _) = pool_with_gradients([GOOD, *bad])
    wanted, (exact, exact_rois, _, _) = roi_oracle.pool(
        X, np.array([GOOD]), cotangent=np.ones((1, 3, 4, 1)), output_size=(3, 4)
    )
    assert np.isnan(y[1:]).all()
    for found, right in ((y[:1], wanted), (d_x, exact), (d_rois[:1], exact_rois)):
        assert_close(found, right, 1e-5)


def test_wild_offsets():
    """They read zero, or NaN, at their own bin."""
    offset = np.zeros((1, 3, 4, 2), F32)
    offset[0, 0, :3, 1], offset[0, 1, 1, 0] = (INF, -INF, 1e30), NAN
    y, (d_x, _, d_offset) = pool_with_gradients([GOOD], offset)
    calm, (_, _, d_calm) = pool_with_gradients([GOOD])
    assert not y[0, 0, :3].any()
    assert not d_offset[0, 0, :3].any()
    np.testing.assert_array_equal(np.argwhere(np.isnan(y)), [[0, 1, 1, 0]])
    others = ~np.isnan(y[..., 0]) & (y[..., 0] != 0)
    assert others.sum() == 8
    np.testing.assert_array_equal(y[others], calm[others])
    np.testing.assert_array_equal(d_offset[others], d_calm[others])
    assert np.isfinite(d_x).all()
    _, (_, d_rois, _) = pool_with_gradients([GOOD], np.where(np.isnan(offset), 0, offset))
    assert np.isfinite(d_rois).all()


def test_an_infinite_pixel_is_read_by_its_readers_alone():
    """Not by boxes of another image, and not by samples outside of the map."""
    x = X.copy()
    x[0, -1, -1], x[0, 0, 0] = INF, INF
    rois = np.array([GOOD, [0, 1.5, 1.5, 2.5, 2.5], [0, 20, 20, 30, 30], [0, -30, -30, -20, -20], [5, 0, 0, 4, 4]], F32)
    rois = np.array([*rois, [0, 0, 0, 5, 4]], F32)
    y = jax.jit(functools.partial(roi_align, output_size=(3, 4)))(x, rois)
    assert np.isfinite(y[:-1]).all()
    assert not np.isfinite(y[-1]).all()


def test_nothing_to_do():
    """No boxes; no images."""
    y, (d_x, *_) = pool_with_gradients(np.zeros((0, 5)))
    assert y.shape == (0, 3, 4, 1)
    assert not d_x.any()
    y = POOL(X[:0], np.array([GOOD], F32))
    assert y.shape == (1, 3, 4, 1)
    assert not y.any()


# ---- transformations


@pytest.mark.slow
def test_derivatives_against_finite_differences(x64):
    """In both modes and to order 2, of every array, away from the kinks."""
    x, rois, offset, mask = roi_oracle.draw((1, 3, 4, 1), boxes=1, output_size=(1, 2))
    rois[0, 1:] = [1.1, 0.8, 3.2, 2.1]

    def f(x, box, offset, mask):
        rois = jnp.concatenate([jnp.zeros((1, 1)), box], axis=1)
        return jnp.sin(deform_roi_pool(x, rois, offset, mask, output_size=(1, 2), sampling_ratio=1))

    check_grads(jax.jit(f), (x, rois[:, 1:], 0.3 * offset, mask), order=2, modes=["fwd", "rev"], rtol=1e-5)


@pytest.mark.slow
def test_vmap():
    """Over images, each with boxes of its own, and over boxes of one map."""
    x, rois, offset, mask = roi_oracle.draw((3, 6, 7, 3), boxes=6, dtype=F32)
    rois[:, 0] = 0
    f = functools.partial(deform_roi_pool, output_size=(3, 4))
    split = [a.reshape(3, 2, *a.shape[1:]) for a in (rois, offset, mask)]
    together = jax.jit(jax.vmap(f))(x[:, None], *split)
    shared = jax.jit(jax.vmap(f, in_axes=(None, 0, 0, 0)))(x[:1], *split)
    for i in range(3):
        assert_close(together[i], roi_oracle.pool(x[i : i + 1], *(a[i] for a in split), output_size=(3, 4))[0], 2e-6)
        assert_close(shared[i], roi_oracle.pool(x[:1], *(a[i] for a in split), output_size=(3, 4))[0], 2e-6)


@pytest.mark.slow
def test_symbolic_sizes():
    """One exported program, with its gradients, for every number of images and boxes and every map."""
    n, h, w, r = export.symbolic_shape("n, h, w, r")
    f = functools.partial(deform_roi_pool, output_size=(3, 4))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, h, w, 3), (r, 5), (r, 3, 4, 2), (r, 3, 4))]
    reread = export.deserialize(export.export(jax.jit(f))(*shapes).serialize(vjp_order=1))
    for shape, boxes in (((2, 4, 5, 3), 3), ((1, 3, 2, 3), 1)):
        arrays = roi_oracle.draw(shape, boxes, dtype=F32)
        cotangent = np.random.default_rng(1).standard_normal((boxes, 3, 4, 3)).astype(F32)
        y, gradients = jax.jit(functools.partial(value_and_gradients, reread.call))(arrays, cotangent)
        wanted, exact = roi_oracle.pool(*arrays, cotangent, output_size=(3, 4))
        assert_close(y, wanted, 1e-5)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-5), gradients, exact)


def sharded(x_over, boxes_over):
    """Arrays on eight devices, the step with gradients compiled for them, and what the oracle says."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays = roi_oracle.draw((8, 6, 7, 3), boxes=16, dtype=F32)
    cotangent = np.random.default_rng(1).standard_normal((16, 3, 4, 3)).astype(F32)
    y, gradients = roi_oracle.pool(*arrays, cotangent, output_size=(3, 4))
    specs = [x_over, boxes_over, boxes_over, boxes_over, boxes_over]
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((*arrays, cotangent), specs, strict=True)]
    return placed, (y, gradients)


def step(*arrays):
    *arrays, cotangent = arrays
    return value_and_gradients(functools.partial(deform_roi_pool, output_size=(3, 4)), arrays, cotangent)


def test_boxes_over_devices_that_have_the_maps():
    """No device asks another for anything, but for the sum of the map's gradients."""
    placed, wanted = sharded(P(), P("data"))
    forward = jax.jit(functools.partial(deform_roi_pool, output_size=(3, 4))).lower(*placed[:4]).compile()
    assert collectives(forward.as_text()) == []
    assert forward(*placed[:4]).sharding.spec[0] == "data"
    program = jax.jit(step).lower(*placed).compile()
    assert {opcode for opcode, _, _ in collectives(program.as_text())} == {"all-reduce"}
    assert {shape for _, shapes, _ in collectives(program.as_text()) for shape in shapes} == {(1, 8 * 6 * 7, 3)}
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), program(*placed), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("boxes_over", [P(), P("data")], ids=str)
def test_images_over_devices(boxes_over):
    """Maps stay where they are if each device has all boxes: each reads its own maps, and results are added."""
    placed, wanted = sharded(P("data"), boxes_over)
    program = jax.jit(step).lower(*placed).compile()
    if boxes_over == P():  # else XLA gathers the maps' gradient
        assert {opcode for opcode, *_ in collectives(program.as_text())} == {"all-reduce"}
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), program(*placed), wanted)


@pytest.mark.slow
def test_images_with_boxes_of_their_own_are_local():
    """By `vmap` over images, forward and backward."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, rois, offset, mask = roi_oracle.draw((8, 6, 7, 3), boxes=16, dtype=F32)
    rois[:, 0] = 0
    arrays = (x[:, None], *(a.reshape(8, 2, *a.shape[1:]) for a in (rois, offset, mask)), np.ones((8, 2, 3, 4, 3), F32))
    placed = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in arrays]
    assert collectives(jax.jit(jax.vmap(step)).lower(*placed).compile().as_text()) == []


@pytest.mark.slow
def test_shard_map_adds_the_maps_gradient_once():
    placed, wanted = sharded(P(), P("data"))
    mesh = placed[0].sharding.mesh
    specs = (P(), *4 * [P("data")])
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P("data"), specs[:4])))
    program = mapped.lower(*placed).compile()
    (once,) = collectives(program.as_text())
    assert (once[0], once[2]) == ("all-reduce", False)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), program(*placed), wanted)


@pytest.mark.parametrize(
    ("size", "ratio"),
    [(7, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((14, 2), (7, 4), (3, 4), (2, 2)))],
)
def test_scratch(size, ratio, optimized):
    """At most four times the result's memory, for 512 boxes of 128 channels: their samples' corners would take 16 or 64 times.

    Five times with nine bins of sixteen samples, whose result is not much larger than the samples' positions.
    """
    shapes = [(1, 50, 76, 128), (512, 5), (512, size, size, 2), (512, size, size)]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    f = functools.partial(deform_roi_pool, output_size=size, sampling_ratio=ratio)
    y = jax.eval_shape(f, *shapes)
    both = functools.partial(value_and_gradients, f)
    for limit, program in (
        (2, jax.jit(f).lower(*shapes)),
        (5 if (size, ratio) == (3, 4) else 4, jax.jit(both).lower(shapes, y)),
    ):
        assert program.compile().memory_analysis().temp_size_in_bytes <= limit * 4 * y.size


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x has shape (4, 5, 1); wanted (batch, H, W, C), channels last, with at least one pixel and channel, such as x[None] for one image"),
        ({"x": X[:, :0]}, ValueError, "x has shape (2, 0, 5, 1)"),
        ({"x": np.ones((1, 2, 2, 1), int)}, TypeError, "x has dtype int64; wanted a floating-point or complex array: x.astype(jnp.float32)"),
        ({"rois": np.ones((3, 4), F32)}, ValueError, "rois has shape (3, 4); wanted (R, 5): the index of an image in x, x1, y1, x2, y2. If all boxes are of image 0: jnp.pad(rois, ((0, 0), (1, 0)))"),
        ({"rois": np.ones(5, F32)}, ValueError, "rois has shape (5,); wanted (R, 5)"),
        ({"rois": np.ones((3, 5), int)}, TypeError, "rois has dtype int64"),
        ({"offset": np.ones((3, 2, 2, 3), F32)}, ValueError, "offset has shape (3, 2, 2, 3); wanted (3, 2, 3, 2): (dy, dx) for each bin of each box"),
        ({"offset": np.ones((3, 2, 2, 3), F32)}, ValueError, "From mmcv's order: jnp.moveaxis(offset, 1, -1)[..., ::-1]"),
        ({"mask": np.ones((3, 1, 2, 3), F32)}, ValueError, "mask has shape (3, 1, 2, 3); wanted (3, 2, 3): a number for each bin of each box"),
        ({"output_size": 0}, ValueError, "output_size=0 is too small; wanted at least 1"),
        ({"sampling_ratio": 0}, ValueError, "sampling_ratio=0 asks for a number of samples that differs from box to box, and shapes are static here; wanted an int of at least 1, such as 2"),
        ({"sampling_ratio": -1}, ValueError, "sampling_ratio=-1 asks"),
        ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio=2.0 is a float; wanted an int"),
        ({"spatial_scale": 0}, ValueError, "spatial_scale=0; wanted pixels of x for one of the image, such as 1 / 16"),
        ({"spatial_scale": "1"}, TypeError, "spatial_scale='1' is a str; wanted a number such as 1.0"),
        ({"gamma": INF}, ValueError, "gamma=inf is not finite; wanted a number such as 1.0"),
        ({"aligned": 1}, TypeError, "aligned=1 is a int; wanted True or False"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    given = {"x": X, "rois": np.ones((3, 5), F32), "output_size": (2, 3)} | change
    with pytest.raises(error) as raised:
        deform_roi_pool(**given)
    assert message in str(raised.value)


def test_the_errors_advice_is_right():
    _, rois, offset, _ = roi_oracle.draw((1, 6, 7, 3), dtype=F32)
    padded = jnp.pad(jnp.asarray(rois[:, 1:]), ((0, 0), (1, 0)))
    np.testing.assert_array_equal(padded, rois)
    theirs = np.moveaxis(offset[..., ::-1], -1, 1)
    np.testing.assert_array_equal(jnp.moveaxis(theirs, 1, -1)[..., ::-1], offset)
