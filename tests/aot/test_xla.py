"""What the compilers of GPUs and TPUs make of the op, on a machine that has neither (`make test-aot`)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dcn_jax
from benchmarks.convolution import Convolution
from tests.support import aot
from tests.support.cases import draw
from tests.support.programs import collectives
from tests.support.running import value_and_gradients
from tests.support.scratch import DETECTOR, LIMITS, share


def device_of(kind, count=1):
    """Devices of a kind; skips the test where its compiler is not installed."""
    if reason := aot.missing(kind):
        pytest.skip(reason)
    return aot.devices(kind, count)[:count]


# Small maps of every rank, and each way in which channels go in groups
CASES = {
    "1-D": draw((2, 40, 16), (3,), 8),
    "2-D": draw((2, 9, 12, 16), (3, 3), 24),
    "3-D": draw((1, 4, 5, 6, 8), (2, 3, 2), 8),
    "groups": draw((2, 9, 12, 16), (3, 3), 8, feature_group_count=4, offset_groups=2, strides=2),
    "depthwise": draw((2, 9, 12, 16), (3, 3), 16, feature_group_count=16, kernel_dilation=2, mask=False, bias=False),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["H100", "TPU v5e", "TPU v6e"])
def test_compiles(kind, name, dtype):
    """The op, all its gradients and its tangent."""
    (device,) = device_of(kind)
    case = CASES[name]
    given = [i for i, array in enumerate(case.arrays) if array is not None]

    def op(*arrays):
        arguments = dict(zip(given, arrays, strict=True))
        return dcn_jax.deform_conv(*map(arguments.get, range(5)), implementation="xla", **case.options)

    def everything(*arrays):
        y, y_tangent = jax.jvp(op, arrays, arrays)
        return *value_and_gradients(op, arrays, y), y_tangent

    shapes = [jax.ShapeDtypeStruct(case.arrays[i].shape, dtype) for i in given]
    y, gradients, _ = aot.compile_for(device, everything, *shapes).out_info
    assert y.shape == jax.eval_shape(op, *shapes).shape
    assert [(g.shape, g.dtype) for g in gradients] == [(s.shape, s.dtype) for s in shapes]


@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("name", DETECTOR)
@pytest.mark.parametrize("kind", ["H100", "TPU v5e"])
def test_scratch(kind, name, mode):
    """Within the limits that hold on a CPU; on a GPU 256 MB are within them too."""
    compile_there = functools.partial(aot.compile_for, *device_of(kind))
    spare = 256e6 / DETECTOR[name].sizes(jnp.float32)["columns_bytes"] if kind == "H100" else 0
    assert share(compile_there, DETECTOR[name], mode) <= max(LIMITS[mode], spare)


@pytest.mark.parametrize("offset_groups", [1, 4])
@pytest.mark.parametrize(("kind", "count"), [("H100", 8), ("TPU v5e", 4)])
def test_batch_sharded_gradients_are_summed_once(kind, count, offset_groups):
    """Under plain `jit`: one sum over the devices for the gradient of the kernel, after the loop, and nothing else."""
    mesh = Mesh(np.array(device_of(kind, count)), ("data",))
    workload = Convolution((8, 32, 32, 64), 64, offset_groups=offset_groups)
    op = functools.partial(workload.call, implementation="xla")
    x, kernel, offset, mask = (
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(workload.shapes(jnp.float32), (P("data"), P(), P("data"), P("data")), strict=True)
    )
    y = x  # the result is of the shape of x
    step = functools.partial(value_and_gradients, op)
    program = aot.compile_for(mesh.devices.flat[0], step, (x, kernel, offset, mask), y)
    found = collectives(program.as_text())
    # Started apart from its end, as on a GPU, a sum may show what it adds beside its result, the last shape.
    sums = [(opcode.removesuffix("-start"), math.prod(shapes[-1]), in_loop) for opcode, shapes, in_loop in found]
    copies = 2 if kind == "TPU v5e" else 1  # a TPU's loop has each matrix twice, for both pixels of a pair
    assert sums == [("all-reduce", copies * kernel.size, False)]
