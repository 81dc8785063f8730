"""Maps split over devices: the same as on one device, forward and backward, and what is exchanged is the halos."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import dcn_jax
from dcn_jax._core.pallas.launch import interpret
from dcn_jax.sharding import halo_deform_conv
from tests.support import bounded
from tests.support.cases import draw
from tests.support.programs import collectives
from tests.support.running import assert_close, normal, value_and_gradients

slow = pytest.mark.slow


def mesh_of(sizes, names, kind=AxisType.Auto):
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=devices)


def split(devices, rank, *, spatial_axis=0, over="space", mesh=None, check_vma=True, **options):
    """`halo_deform_conv` of whole arrays with one batch axis, one spatial axis of which is split over devices."""
    mesh = mesh or mesh_of((devices,), ("space",))
    rows = P("data" if "data" in mesh.axis_names else None, *[None] * spatial_axis, over)

    def op(x, kernel, offset, mask=None, bias=None, **more):
        shard = functools.partial(halo_deform_conv, axis_name=over, spatial_axis=spatial_axis, **options, **more)
        specs = (rows, P(), rows, rows, P())
        call = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=check_vma)
        return call(x, kernel, offset, mask, bias)

    return op


# (the case, the bound of its offsets, which are within ±3, the number of devices)
CASES = {
    "1-D": (draw((2, 24, 3), (4,), 2), 1, 8),
    "2-D, groups": (draw((2, 16, 4, 4), (3, 2), 6, feature_group_count=2, offset_groups=2), 2.5, 4),
    "2-D, wrap": (draw((1, 16, 4, 4), (3, 3), 2, offset_groups=2, padding_mode="wrap", mask=False), 2, 4),
}
MORE = {
    "3-D": (draw((1, 8, 3, 4, 2), (2, 3, 2), 2), 3, 2),
    "3-D, wrap": (draw((1, 8, 3, 4, 2), (3, 1, 2), 2, padding_mode="wrap"), 3, 2),
    "1-D, wrap, one device": (draw((2, 6, 3), (3,), 2, padding_mode="wrap"), 3, 1),
    "one device": (draw((2, 6, 3), (3,), 2), 3, 1),
    "dilation": (draw((2, 16, 5, 4), (3, 3), 6, kernel_dilation=(2, 1), bias=False), 1.5, 4),
    "integer padding": (draw((2, 12, 5, 4), (3, 3), 6, padding=((0, 2), (1, 0))), 1, 4),
    "negative padding": (draw((2, 12, 5, 4), (3, 3), 6, padding=((-2, 4), 0)), 1, 2),
    "SAME_LOWER": (draw((2, 16, 5, 4), (2, 4), 6, padding="SAME_LOWER"), 0.5, 8),
    "strides across": (draw((2, 16, 5, 4), (3, 3), 6, strides=(1, 2)), 3, 4),
    "borders of each kind": (draw((2, 16, 5, 4), (3, 3), 6, padding_mode=("wrap", "reflect")), 3, 4),
    "no offsets": (draw((2, 8, 5, 4), (3, 3), 6), 0, 8),
    "a bound far beyond": (draw((2, 32, 5, 4), (3, 3), 6), 15, 2),
}


def check(over_devices, case, bound, tolerance=1e-12):
    """The result and the gradients of all arguments are those of the whole map on one device."""
    y = jax.eval_shape(functools.partial(dcn_jax.deform_conv, **case.options), *case.arrays)
    cotangent = np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype)
    whole = functools.partial(dcn_jax.deform_conv, max_offset=bound, **case.options)
    sharded = functools.partial(over_devices, max_offset=bound, **case.options)
    wanted, found = (
        jax.jit(functools.partial(value_and_gradients, op))(case.arrays, cotangent) for op in (whole, sharded)
    )
    jax.tree.map(functools.partial(assert_close, tolerance=tolerance), found, wanted)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=slow) for name in MORE)])
def test_equals_the_whole_map(name, x64):
    case, bound, devices = (CASES | MORE)[name]
    over_devices = split(devices, case.arrays[1].ndim - 2)
    check(over_devices, case.astype(np.float64), bound)


def test_equals_the_oracle(x64):
    """Which shares no code with the op."""
    case = draw((1, 8, 3, 2), (3, 2), 2)
    bounded.check_against_oracle(split(4, 2, max_offset=1), case.astype(np.float64), 1, 1e-12)


@slow
def test_circular_padding(x64):
    case = draw((2, 12, 4, 2), (3, 3), 2)
    check(split(4, 2), case._replace(options={"padding": "CIRCULAR"}).astype(np.float64), 1.5)


@slow
def test_columns_are_split(x64):
    case = draw((2, 4, 16, 2), (3, 3), 2, strides=(2, 1), padding_mode=("edge", "wrap"))
    check(split(4, 2, spatial_axis=1), case.astype(np.float64), 2)


def test_batch_and_rows_are_split(x64):
    mesh = mesh_of((2, 4), ("data", "space"))
    check(split(4, 2, mesh=mesh), draw((2, 16, 3, 2), (3, 3), 2).astype(np.float64), 1.5)


@slow
def test_rows_over_two_mesh_axes(x64):
    mesh = mesh_of((2, 2), ("node", "gpu"))
    case = draw((1, 12, 3, 2), (3, 3), 2, padding_mode="wrap").astype(np.float64)
    check(split(4, 2, mesh=mesh, over=("node", "gpu")), case, 2)


@slow
def test_without_the_checks_of_shard_map(x64):
    check(split(4, 2, check_vma=False), draw((1, 12, 3, 2), (3, 3), 2).astype(np.float64), 2)


@slow
def test_default_mesh(x64):
    """As `jax.make_mesh` makes it, with explicit axes: the arrays lie on it before the call."""
    case, mesh = (
        draw((1, 12, 3, 2), (3, 3), 2, mask=False, bias=False).astype(np.float64),
        jax.make_mesh((4,), ("space",)),
    )
    rows = jax.NamedSharding(mesh, P(None, "space"))
    x, kernel, offset, *_ = case.arrays
    x, offset = jax.device_put((x, offset), rows)
    y = jax.jit(split(4, 2, mesh=mesh, max_offset=2))(x, kernel, offset)
    assert jax.typeof(y).sharding.spec[1] == "space"
    assert_close(y, dcn_jax.deform_conv(*case.arrays, max_offset=2), 1e-12)


def test_bfloat16():
    """As exact as bfloat16 is, beside float64; a gradient in a halo is rounded twice."""
    narrow = draw((2, 16, 4, 4), (3, 3), 6).astype(jnp.bfloat16)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.float64, narrow.arrays)
        cotangent = np.asarray(np.random.default_rng(1).standard_normal((2, 16, 4, 6)), jnp.bfloat16)
        # 1.3 is 1.296875 in bfloat16
        whole = functools.partial(dcn_jax.deform_conv, max_offset=float(jnp.bfloat16(1.3)))
        wanted = jax.jit(functools.partial(value_and_gradients, whole))(exact, np.float64(cotangent))
    found = jax.jit(functools.partial(value_and_gradients, split(4, 2, max_offset=1.3)))(narrow.arrays, cotangent)
    assert {array.dtype for array in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: assert_close(np.float64(a), b, float(jnp.finfo(jnp.bfloat16).eps)), found, wanted)


def test_a_bound_that_rounds_up():
    """259 is 260 in bfloat16: the offsets reach one row further than the bound says."""
    x = normal(1, 1024, 1)
    kernel, offset = jnp.ones((1, 1, 1)), jnp.full((1, 1024, 1), 300, jnp.bfloat16)
    y = jax.jit(split(2, 1, max_offset=259))(x, kernel, offset)
    np.testing.assert_array_equal(y[:, :-260], x[:, 260:])


@slow
def test_tangents_and_second_derivatives(x64):
    case = draw((1, 8, 3, 2), (3, 2), 2, whole=0).astype(np.float64)

    def twice(op):
        gradients = bounded.gradients_of(functools.partial(op, max_offset=1.5), case)
        return jax.jit(lambda *arrays: jax.jvp(gradients, arrays, arrays))(*case.arrays)

    jax.tree.map(functools.partial(assert_close, tolerance=1e-11), twice(split(2, 2)), twice(dcn_jax.deform_conv))


@slow
@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_kernels(implementation):
    """Those of a TPU take no border but zeros: within the halos a ring has no other."""
    case = draw((1, 16, 6, 4), (3, 3), 5, padding_mode=("wrap", "zeros"))
    fused = split(2, 2, check_vma=False, implementation=implementation, precision="highest")
    whole = functools.partial(dcn_jax.deform_conv, max_offset=2, **case.options)
    cotangent = np.random.default_rng(1).standard_normal((1, 16, 6, 5)).astype(np.float32)
    wanted = jax.jit(functools.partial(value_and_gradients, whole))(case.arrays, cotangent)
    with interpret():  # without `check_vma`, which fails on the interpreter's own loops
        sharded = functools.partial(fused, max_offset=2, **case.options)
        found = jax.jit(functools.partial(value_and_gradients, sharded))(case.arrays, cotangent)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), found, wanted)


# What is exchanged


def elements(found, opcode):
    """The numbers of elements that a program's collectives of this kind receive, sorted."""
    return sorted(math.prod(shape) for name, shapes, _ in found if name.startswith(opcode) for shape in shapes[-1:])


@pytest.mark.parametrize("rows", [16, 64])
def test_devices_exchange_halos_and_nothing_else(rows):
    """However long the map: padding and bound, 1 + 2 rows before a shard and 2 + 2 after it; and back for the gradient."""
    x, window, features, bound = (2, rows, 5, 4), (4, 3), 6, 2
    case = draw(x, window, features)
    cotangent = np.ones((*x[:-1], features), np.float32)
    op = split(4, 2, max_offset=bound)
    row, (_, kernel, _, _, bias) = 2 * 5 * 4, case.arrays

    forward = collectives(jax.jit(op).lower(*case.arrays).compile().as_text())
    assert {opcode for opcode, *_ in forward} == {"collective-permute"}
    assert elements(forward, "collective-permute") == [3 * row, 4 * row]

    step = functools.partial(value_and_gradients, op)
    found = collectives(jax.jit(step).lower(case.arrays, cotangent).compile().as_text())
    assert {opcode for opcode, *_ in found} == {"collective-permute", "all-reduce"}
    assert elements(found, "collective-permute") == [3 * row, 3 * row, 4 * row, 4 * row]
    assert (
        sum(math.prod(shape) for name, shapes, _ in found if name == "all-reduce" for shape in shapes)
        == kernel.size + bias.size
    )
    assert not any(in_loop for *_, in_loop in found)


def test_plain_jit_fetches_the_whole_map():
    """What the exchange of halos saves: XLA does not see that a gather reads near its own rows."""
    case = draw((1, 64, 5, 4), (3, 3), 6, mask=False, bias=False)
    rows = jax.NamedSharding(mesh_of((4,), ("space",)), P(None, "space"))
    x, kernel, offset, *_ = case.arrays
    arrays = jax.device_put(x, rows), kernel, jax.device_put(offset, rows)
    op = functools.partial(dcn_jax.deform_conv, max_offset=2)
    found = collectives(jax.jit(op).lower(*arrays).compile().as_text())
    assert max(elements(found, "all-")) >= x.size


# What it refuses

SHAPES = {"x": (1, 16, 6, 4), "kernel": (3, 3, 4, 5), "offset": (1, 16, 6, 18)}
REFUSED = {
    "no bound": ({"max_offset": None}, "max_offset=None leaves offsets unbounded.*deform_conv on the whole map"),
    "a negative bound": ({"max_offset": -1}, "max_offset=-1 must be finite and not negative"),
    "uneven rows": ({"x": (1, 18, 6, 4), "offset": (1, 18, 6, 18)}, "4 does not evenly divide 18"),
    "other rows": ({"offset": (1, 20, 6, 18)}, r"offset has shape \(1, 5, 6, 18\); wanted \(\*batch, 4, 6, OG \* 18\)"),
    "a wide halo": (
        {"max_offset": 3.5},
        r"the halo of 5 rows \(max_offset=3.5, padding \(1, 1\)\) is wider than a shard.*4 rows",
    ),
    "strides": ({"strides": 2}, r"strides=\(2, 2\) has 2 along spatial axis 0"),
    "edge": ({"padding_mode": "edge"}, 'padding_mode=.*\'edge\' along spatial axis 0.*wanted "zeros" or "wrap"'),
    "REFLECT": ({"padding": "REFLECT"}, "padding_mode=.*'reflect' along spatial axis 0"),
    "VALID": ({"padding": "VALID"}, "padding='VALID' adds 0 rows along spatial axis 0.*wanted \"SAME\", or 2 in all"),
    "more padding": ({"padding": 2}, "padding=2 adds 4 rows along spatial axis 0"),
    "spatial_axis": ({"spatial_axis": 2}, "spatial_axis=2 is not one of the 2 spatial axes"),
    "no axes": ({"x": (6, 4)}, r"x has shape .*; wanted \(\*batch, \*spatial, C\) with 2 spatial axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    given, message = REFUSED[name]
    arrays = [jax.ShapeDtypeStruct(given.get(array, shape), jnp.float32) for array, shape in SHAPES.items()]
    options = {"max_offset": 1, "axis_name": "space"} | {k: v for k, v in given.items() if k not in SHAPES}
    specs = [P() if len(array.shape) < 4 else P(None, "space") for array in arrays]
    specs[1] = P()
    call = jax.shard_map(
        functools.partial(halo_deform_conv, **options),
        mesh=mesh_of((4,), ("space",)),
        in_specs=tuple(specs),
        out_specs=P(None, "space"),
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, *arrays)


def test_a_call_outside_shard_map_is_refused():
    with pytest.raises(ValueError, match=r"axis_name='space' is not a mesh axis of a jax\.shard_map around this call"):
        halo_deform_conv(*map(jnp.ones, SHAPES.values()), max_offset=1, axis_name="space")


def test_rows_that_are_not_split_are_refused():
    """Else every device would take the whole map for a shard of a larger one."""
    op = functools.partial(halo_deform_conv, max_offset=1, axis_name="space")
    call = jax.shard_map(op, mesh=mesh_of((4,), ("space",)), in_specs=P(), out_specs=P(None, "space"))
    with pytest.raises(ValueError, match=r"x is the same on all devices along \['space'\]; wanted its rows split"):
        jax.eval_shape(call, *map(jnp.ones, SHAPES.values()))
