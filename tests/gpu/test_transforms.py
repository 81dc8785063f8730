"""What JAX makes of the op, on a GPU: maps over it, and derivatives of its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.support import gpu
from tests.support.cases import Case, draw
from tests.support.running import value_and_gradients

if reason := gpu.missing():
    pytest.skip(reason, allow_module_level=True)

IMPLEMENTATIONS = ("pallas_gpu", "xla")
PRECISION, TOLERANCE = gpu.PRECISIONS["HIGHEST"]
CASE = draw((2, 5, 7, 16), (3, 3), 24, offset_groups=2, whole=0)
ARGUMENTS = ("x", "kernel", "offset", "mask", "bias")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mapped", ["x", "kernel", "offset", "x kernel offset mask bias"])
def test_vmap(record_property, mapped, implementation):
    """Of values and gradients alike, over some arrays or all: each member as if alone."""
    cotangent = gpu.draw_cotangent(CASE)
    members = [draw((2, 5, 7, 16), (3, 3), 24, offset_groups=2, seed=seed) for seed in range(3)]
    over = [0 if name in mapped.split() else None for name in ARGUMENTS]
    arrays = [
        np.stack([member.arrays[i] for member in members]) if axis == 0 else CASE.arrays[i]
        for i, axis in enumerate(over)
    ]
    op = gpu.bound(implementation, precision=PRECISION)
    program = jax.jit(jax.vmap(lambda *arrays: value_and_gradients(op, arrays, cotangent), over))
    y, gradients = gpu.run(program, *arrays)
    for n in range(3):
        alone = Case(tuple(a if axis is None else a[n] for a, axis in zip(arrays, over, strict=True)), {})
        got = gpu.named((y[n], [gradient[n] for gradient in gradients]))
        gpu.check(record_property, f"{mapped} {n}", got, gpu.exact(alone, cotangent), TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_set_of_offsets_for_all_images(record_property, implementation):
    x, kernel, offset, mask, bias = CASE.arrays
    cotangent = gpu.draw_cotangent(CASE)
    program = gpu.gradients_of(gpu.bound(implementation, precision=PRECISION))
    y, gradients = gpu.run(program, (x, kernel, offset[0], mask[0], bias), cotangent)
    repeated = (np.broadcast_to(a[0], a.shape) for a in (offset, mask))
    wanted = gpu.exact(Case((x, kernel, *repeated, bias), {}), cotangent)
    wanted |= {name: wanted[name].sum(axis=0) for name in ("doffset", "dmask")}
    gpu.check(record_property, "shared offsets", gpu.named((y, gradients)), wanted, TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_of_gradients(record_property, implementation):
    rng = np.random.default_rng(3)
    cotangent, directions = gpu.draw_cotangent(CASE), [rng.standard_normal(a.shape) for a in CASE.arrays]
    directions = [d.astype(np.float32) for d in directions]

    def second(implementation):
        op = gpu.bound(implementation, precision=PRECISION)

        def along(arrays, directions, cotangent):
            _, gradients = value_and_gradients(op, arrays, cotangent)
            return sum(jnp.sum(g * d) for g, d in zip(gradients, directions, strict=True))

        return jax.grad(along)

    arguments = (CASE.arrays, directions, cotangent)
    got = gpu.run(jax.jit(second(implementation)), *arguments)
    wanted = gpu.on_host(second("xla"), *arguments)
    got, wanted = (dict(zip(ARGUMENTS, results, strict=True)) for results in (got, wanted))
    gpu.check(record_property, "second order", got, wanted, 3 * TOLERANCE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_outside_of_jit(record_property, implementation):
    cotangent = gpu.draw_cotangent(CASE)
    op = gpu.bound(implementation, precision=PRECISION)
    got = value_and_gradients(op, tuple(map(jnp.asarray, CASE.arrays)), jnp.asarray(cotangent))
    gpu.check(record_property, "outside of jit", gpu.named(got), gpu.exact(CASE, cotangent), TOLERANCE)


@pytest.mark.skipif(gpu.INTERPRETED, reason="the interpreter knows no shard_map with its checks")
@pytest.mark.parametrize("over", ["jit", "shard_map"])
def test_on_a_mesh(record_property, over):
    """Of one GPU: partitioned all the same."""
    mesh, cotangent = Mesh(np.array(jax.devices()[:1]), ("data",)), gpu.draw_cotangent(CASE)
    places = (P("data"), P(), P("data"), P("data"), P())

    def f(arrays, cotangent):
        return value_and_gradients(gpu.bound("pallas_gpu", precision=PRECISION), arrays, cotangent)

    if over == "shard_map":
        f = jax.shard_map(f, mesh=mesh, in_specs=(places, P("data")), out_specs=(P("data"), places))
    arguments = (CASE.arrays, cotangent)
    placed = jax.tree.map(lambda a, p: jax.device_put(a, NamedSharding(mesh, p)), arguments, (places, P("data")))
    gpu.check(record_property, over, gpu.named(jax.jit(f)(*placed)), gpu.exact(CASE, cotangent), TOLERANCE)


def test_the_result_has_the_same_bits_each_time():
    case = draw((2, 20, 30, 45), (3, 3), 70)
    run = gpu.compiled(jax.jit(gpu.bound("pallas_gpu")), *case.arrays)
    first = run(*case.arrays)
    for _ in range(3):
        np.testing.assert_array_equal(run(*case.arrays), first)
