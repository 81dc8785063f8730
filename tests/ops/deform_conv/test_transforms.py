"""The op under JAX's transformations: batching, derivatives of every kind and order, control flow, devices, export."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from tests.support.cases import draw
from tests.support.programs import collectives
from tests.support.running import assert_close, compiled, value_and_gradients

needs, quick = pytest.mark.needs, pytest.mark.quick

CASE = draw((2, 4, 3, 2), (2, 3), 2, offset_groups=2, strides=(1, 2))  # whole offsets among them
SMOOTH = draw((1, 3, 4, 2), (2, 2), 2, offset_groups=2, whole=0)  # every position away from the kinks


def loss(op, case):
    """A scalar of all arguments, linear in none."""

    def of(*arrays):
        return jnp.sum(jnp.sin(op(*arrays, **case.options)))

    return of


# Batching


@pytest.mark.parametrize(
    "in_axes",
    [
        pytest.param((0, 0, 0, 0, 0), id="all"),
        pytest.param((None, 0, None, None, None), id="kernel alone"),
        pytest.param((None, None, 0, None, None), id="offset alone"),
        pytest.param((-1, 2, 1, None, 0), id="mixed", marks=quick),
    ],
)
def test_vmap(op, in_axes):
    """Each slice of a vmapped call is the call of the slices."""
    draws = [draw((2, 4, 3, 2), (2, 3), 2, seed=seed).arrays for seed in range(3)]
    stacked = [arrays[0] if axis is None else np.stack(arrays, axis) for axis, *arrays in zip(in_axes, *draws, strict=True)]  # fmt: skip
    together = jax.jit(jax.vmap(op, in_axes, 1))(*stacked)
    alone = compiled(op)
    for i in range(3):
        arguments = [draws[0][j] if axis is None else draws[i][j] for j, axis in enumerate(in_axes)]
        assert_close(together[:, i], alone(*arguments), 1e-6)


def test_gradients_of_a_vmap_of_a_vmap(op):
    """Per-example gradients, as in differential privacy, of a batch without batch axis."""
    x, kernel, offset, mask, bias = draw((3, 4, 3, 2), (2, 2), 2).arrays
    case = CASE._replace(options={})
    gradient = jax.grad(loss(op, case), (0, 1, 2))
    each = jax.jit(jax.vmap(gradient, (0, None, 0, 0, None)))(x, kernel, offset, mask, bias)
    together = jax.jit(gradient)(x, kernel, offset, mask, bias)
    assert_close(each[0], together[0], 1e-5)
    assert_close(np.sum(each[1], axis=0), together[1], 1e-5)
    assert_close(each[2], together[2], 1e-5)


# Derivatives


@needs("forward_mode", "second_order", "float64")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(draw((1, 4, 2), (2,), 2, whole=0, offset_groups=2), id="1-D", marks=pytest.mark.slow),
        pytest.param(SMOOTH, id="2-D", marks=pytest.mark.slow),
        pytest.param(draw((2, 2, 2, 1), (1, 2, 2), 1, whole=0), id="3-D", marks=[needs("rank 3"), pytest.mark.slow]),
    ],
)
def test_derivatives_against_finite_differences(op, x64, case):
    """In both modes and to order 2, with respect to everything at once."""
    check_grads(jax.jit(loss(op, case)), case.astype(np.float64).arrays, order=2, modes=["fwd", "rev"], rtol=1e-5)


@needs("forward_mode", "float64")
def test_forward_mode_is_the_transpose_of_reverse_mode(op, x64):
    """Also at the kinks, where finite differences say nothing."""
    arrays = CASE.astype(np.float64).arrays
    tangents = draw((2, 4, 3, 2), (2, 3), 2, offset_groups=2, strides=(1, 2), seed=1).astype(np.float64).arrays

    @jax.jit
    def both(arrays, tangents):
        f = functools.partial(op, **CASE.options)
        y, y_tangent = jax.jvp(f, arrays, tangents)
        _, gradients = value_and_gradients(f, arrays, y)
        return jnp.vdot(y, y_tangent), sum(map(jnp.vdot, gradients, tangents))

    forward, reverse = both(arrays, tangents)
    np.testing.assert_allclose(forward, reverse, rtol=1e-12)


@needs("second_order", "forward_mode", "float64")
def test_hessian_vector_product(op, x64):
    """Forward over reverse equals reverse over reverse, and finite differences of the gradient."""
    arrays = SMOOTH.astype(np.float64).arrays
    direction = draw((1, 3, 4, 2), (2, 2), 2, offset_groups=2, seed=1).astype(np.float64).arrays
    gradient = jax.grad(loss(op, SMOOTH), tuple(range(5)))

    def along(*arrays):
        return sum(map(jnp.vdot, gradient(*arrays), direction))

    @jax.jit
    def products(arrays):
        return jax.jvp(gradient, arrays, direction)[1], jax.grad(along, tuple(range(5)))(*arrays)

    forward, reverse = products(arrays)
    gradient = jax.jit(gradient)
    ahead, behind = (gradient(*[a + h * d for a, d in zip(arrays, direction, strict=True)]) for h in (1e-6, -1e-6))
    for f, r, a, b in zip(forward, reverse, ahead, behind, strict=True):
        assert_close(f, r, 1e-12)
        assert_close(f, (a - b) / 2e-6, 1e-7)


@quick
@needs("second_order")
def test_gradient_of_a_gradient(op):
    """Meta-learning's: the gradient, with respect to x, of the loss after one step of the other arguments."""
    x, *weights = CASE.arrays
    case_loss = loss(op, CASE)

    def after_a_step(x, weights):
        gradients = jax.grad(lambda weights: case_loss(x, *weights))(weights)
        return case_loss(x, *[w - 0.01 * g for w, g in zip(weights, gradients, strict=True)])

    gradient = jax.jit(jax.grad(after_a_step))(x, weights)
    direction = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    f = jax.jit(after_a_step)
    difference = (f(x + 1e-2 * direction, weights) - f(x - 1e-2 * direction, weights)) / 2e-2
    np.testing.assert_allclose(np.vdot(gradient, direction), difference, rtol=1e-2)


@pytest.mark.parametrize("size", [1, 4])
def test_the_derivative_at_a_whole_number_is_the_right_hand_one(op, size):
    """At -1 too, where torchvision has it and mmcv has 0, and 0 at the map's size."""
    x = np.random.default_rng(0).standard_normal((size, 1)).astype(np.float32)
    positions = np.arange(-3, size + 3, dtype=np.float32)
    kernel, padding = np.ones((1, 1, 1), np.float32), ((0, len(positions) - size),)
    offset = positions - np.arange(len(positions))

    def total(offset):
        return jnp.sum(op(x, kernel, offset[:, None], padding=padding))

    slope = jax.jit(jax.grad(total))(offset)
    padded = np.pad(x[:, 0], 3 + 1)  # from -4 on
    np.testing.assert_array_equal(slope, np.diff(padded)[1:])


# Control flow


def test_scan_and_remat(op):
    """Layers in a scan, recomputed in the backward pass, are the layers one after the other."""
    x, kernel, offset, mask, bias = draw((1, 4, 3, 2), (3, 3), 2).arrays
    kernels = np.stack([kernel, 0.5 * kernel, -kernel])

    def one_after_another(x, kernels, offset):
        for kernel in kernels:
            x = jnp.tanh(op(x, kernel, offset, mask, bias))
        return jnp.sum(x**2)

    def scanned(x, kernels, offset):
        layer = jax.checkpoint(lambda x, kernel: (jnp.tanh(op(x, kernel, offset, mask, bias)), None))
        return jnp.sum(lax.scan(layer, x, kernels)[0] ** 2)

    results = [jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, kernels, offset) for f in (one_after_another, scanned)]
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *results)


def test_cond_and_while(op):
    """The op inside of branches and of a loop whose length is not known."""
    x, kernel, offset, mask, bias = draw((1, 4, 3, 2), (3, 3), 2).arrays

    @jax.jit
    def run(times):
        def body(_, x):
            return lax.cond(x[0, 0, 0, 0] < 1e9, lambda x: op(x, kernel, offset, mask, bias), jnp.zeros_like, x)

        return lax.fori_loop(0, times, body, jnp.asarray(x))

    once = compiled(op)(x, kernel, offset, mask, bias)
    np.testing.assert_allclose(run(1), once, rtol=1e-5, atol=1e-5)
    assert_close(run(2), compiled(op)(once, kernel, offset, mask, bias), 1e-5)


# Compiling


def compilations(f):
    """How many programs are compiled while f runs."""
    count = 0

    def listen(event, duration, **_):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(f())
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


def test_jit_compiles_once(op):
    step = jax.jit(jax.value_and_grad(lambda *arrays: jnp.sum(op(*arrays)), (0, 1)))
    first, second = (list(map(jnp.asarray, draw((1, 3, 3, 2), (2, 2), 2, seed=seed).arrays)) for seed in (0, 1))
    assert compilations(lambda: step(*first)) == 1
    assert compilations(lambda: step(*second)) == 0


def test_without_jit_a_second_call_compiles_nothing(op):
    first, second = (list(map(jnp.asarray, draw((1, 3, 3, 2), (2, 2), 2, seed=seed).arrays)) for seed in (0, 1))
    assert compilations(lambda: op(*first)) > 0
    assert compilations(lambda: op(*second)) == 0


@needs("export")
def test_export_with_a_symbolic_batch_and_back(op):
    """One exported program, with its gradient, serves every batch size, 1 among them."""
    x, kernel, offset, mask, bias = draw((3, 4, 3, 2), (2, 3), 2, offset_groups=2).arrays
    batch = jax.export.symbolic_shape("batch")
    shape = lambda a, batched: jax.ShapeDtypeStruct((*batch, *a.shape[1:]) if batched else a.shape, a.dtype)  # noqa: E731
    arguments = list(map(shape, (x, kernel, offset, mask, bias), (True, False, True, True, False)))
    exported = jax.export.export(jax.jit(op))(*arguments)
    reread = jax.export.deserialize(exported.serialize(vjp_order=1))
    for size in (1, 3):
        arrays = x[:size], kernel, offset[:size], mask[:size], bias
        cotangent = np.random.default_rng(1).standard_normal((size, 4, 3, 2)).astype(np.float32)
        results = [jax.jit(functools.partial(value_and_gradients, f))(arrays, cotangent) for f in (reread.call, op)]
        (y, gradients), (wanted, wanted_gradients) = results
        assert_close(y, wanted, 1e-6)
        jax.tree.map(functools.partial(assert_close, tolerance=1e-5), gradients, wanted_gradients)


# Devices

SPECS = P("data"), P(), P("data"), P("data"), P()


@pytest.fixture(scope="module")
def mesh():
    """Eight devices for the batch, with axes as in a plain `jit` (the partitioner propagates shardings)."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def test_collectives_are_found(mesh):
    """The reader of programs sees what the next tests say is not there."""
    x = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, P("data")))

    def outside(x):
        return jnp.sum(x, axis=0)

    def inside(x):
        return lax.scan(lambda total, _: (total + jnp.sum(x * total), None), 1.0, length=3)[0]

    def gathered(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P()))

    programs = [jax.jit(f).lower(x).compile().as_text() for f in (outside, inside, gathered)]
    assert list(map(collectives, programs)) == [
        [("all-reduce", [(4,)], False)],
        [("all-reduce", [()], True)],
        [("all-gather", [(8, 4)], False)],
    ]


PLAIN = draw((8, 4, 5, 4), (3, 3), 6)
OTHERS = [
    pytest.param(
        draw((16, 4, 4, 4), (3, 2), 6, feature_group_count=2, offset_groups=2, mask=False, strides=2),
        id="groups, v1",
    ),
    pytest.param(draw((8, 2, 6, 3), (3,), 5), id="1-D, two batch axes", marks=pytest.mark.slow),
]
SHARDED = [pytest.param(PLAIN, id="plain"), *OTHERS]
QUICK = [pytest.param(PLAIN, id="plain", marks=quick), *OTHERS]


def shard(case, mesh):
    """The arrays of a case, those of the data split over the devices along their first axis."""
    return tuple(
        None if array is None else jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(case.arrays, SPECS, strict=True)
    )


@needs("sharding")
@pytest.mark.parametrize("case", SHARDED)
def test_batch_sharded_forward_is_local(op, mesh, case):
    """Under plain `jit`: no device asks another for anything."""
    arrays = shard(case, mesh)
    compiled_op = jax.jit(functools.partial(op, **case.options)).lower(*arrays).compile()
    assert collectives(compiled_op.as_text()) == []
    y = compiled_op(*arrays)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), y.ndim)
    assert_close(y, compiled(op, **case.options)(*case.arrays), 1e-6)


def backward(op, case):
    """The result and the gradients of all arguments, as a function of the arrays and the cotangent."""
    return functools.partial(value_and_gradients, functools.partial(op, **case.options))


@needs("sharding")
@pytest.mark.parametrize("case", QUICK)
def test_batch_sharded_backward_sums_only_gradients_of_parameters(op, mesh, case):
    """Each once, after the loop over the taps; all else stays where its image is."""
    arrays = shard(case, mesh)
    shape = jax.eval_shape(functools.partial(op, **case.options), *arrays).shape
    cotangent = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    sharded = jax.device_put(cotangent, NamedSharding(mesh, P("data")))
    step = jax.jit(backward(op, case)).lower(arrays, sharded).compile()

    results = step(arrays, sharded), jax.jit(backward(op, case))(case.arrays, cotangent)
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *results)

    found = collectives(step.as_text())
    kernel, bias = case.arrays[1], case.arrays[4]
    taps = math.prod(kernel.shape[:-2])
    assert {opcode for opcode, *_ in found} == {"all-reduce"}
    sizes = [math.prod(shape) for _, shapes, _ in found for shape in shapes]
    assert set(sizes) <= {kernel.size, kernel.size // taps, bias.size}
    if any(in_loop for *_, in_loop in found):
        pytest.xfail("the gradient of the kernel is summed over the devices once per tap, within the loop")
    assert sum(sizes) == kernel.size + bias.size


@needs("shard_map")
def test_shard_map(op, mesh):
    """With its checks of what varies over the devices, forward and backward."""
    cotangent = np.random.default_rng(1).standard_normal((8, 4, 5, 6)).astype(np.float32)
    over_devices = jax.shard_map(op, mesh=mesh, in_specs=SPECS, out_specs=P("data"))
    results = [jax.jit(backward(f, PLAIN))(PLAIN.arrays, cotangent) for f in (over_devices, op)]
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *results)


@needs("shard_map")
def test_shard_map_sums_gradients_of_parameters_after_the_loop(op, mesh):
    """The kernel is the same on all devices. Each sums its own steps, and the devices' sums are added once."""
    cotangent = np.ones((8, 4, 5, 6), np.float32)
    over_devices = jax.shard_map(op, mesh=mesh, in_specs=SPECS, out_specs=P("data"))
    found = collectives(jax.jit(backward(over_devices, PLAIN)).lower(PLAIN.arrays, cotangent).compile().as_text())
    assert {opcode for opcode, *_ in found} == {"all-reduce"}
    assert not any(in_loop for *_, in_loop in found)


@needs("sharding")
def test_explicit_sharding(op):
    """On a mesh as `jax.make_mesh` makes it now, where shardings are part of the types."""
    cotangent = np.random.default_rng(1).standard_normal((8, 4, 5, 6)).astype(np.float32)
    wanted = jax.jit(backward(op, PLAIN))(PLAIN.arrays, cotangent)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        arrays = tuple(jax.device_put(array, spec) for array, spec in zip(PLAIN.arrays, SPECS, strict=True))
        y, gradients = jax.jit(backward(op, PLAIN))(arrays, jax.device_put(cotangent, P("data")))
        assert y.sharding.spec[0] == "data"
        assert gradients[0].sharding.spec[0] == "data"
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), (y, gradients), wanted)
