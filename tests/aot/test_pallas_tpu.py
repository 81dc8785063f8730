"""What the compilers for TPUs make of the kernels for bounded offsets, on a machine that has none (`make test-aot`)."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dcn_jax import deform_conv
from tests.support import aot
from tests.support.cycles import bundles_in_loops, estimate
from tests.support.running import value_and_gradients

if reason := aot.missing("TPU v5e"):
    pytest.skip(reason, allow_module_level=True)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DETECTOR = ((8, 50, 76, 256), (3, 3, 256, 256))

# x, kernel, options; the largest bound, few channels, one tile, and the most that `refusal` lets on the chip.
OTHERS = {
    "far": ((1, 14, 30, 64), (3, 3, 64, 32), {"max_offset": 8, "kernel_dilation": 2}),
    "odd": ((2, 7, 5, 3), (2, 1, 3, 130), {"max_offset": 0.5}),
    "near the limit": ((1, 25, 38, 768), (3, 3, 768, 640), {}),
    "wide": ((1, 40, 1000, 256), (3, 3, 256, 256), {}),
    "exact": ((1, 14, 14, 128), (3, 3, 128, 128), {"precision": "highest"}),
}


def program(x, kernel, dtype, mode, **options):
    """A function and the shapes of its arguments; "backward" is the gradients alone."""
    taps, batch, *rest = kernel[0] * kernel[1], *x[:3]
    kinds = [(x, dtype), (kernel, dtype), ((batch, *rest, 2 * taps), jnp.float32), ((batch, *rest, taps), jnp.float32)]
    shapes = [jax.ShapeDtypeStruct(*kind) for kind in [*kinds, ((batch, *rest, kernel[-1]), dtype)]]
    op = functools.partial(deform_conv, **{"max_offset": 4, "implementation": "pallas_tpu"} | options)
    if mode == "forward":
        return op, shapes[:4]
    return lambda *arrays: value_and_gradients(op, arrays[:4], arrays[4])[1], shapes


@pytest.mark.parametrize("kind", aot.TPUS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OTHERS)
def test_it_compiles(name, dtype, kind):
    x, kernel, options = OTHERS[name]
    f, shapes = program(x, kernel, DTYPES[dtype], "backward", **options)
    compiled = aot.compile_for(aot.devices(kind)[0], f, *shapes).as_text()
    assert "deform_conv_backward" in compiled
    assert "gather" not in compiled


# Millions of cycles on a TPU v5e, around the kernel and bundles of instructions for each tile; a little above what is found,
# on either end of JAX.
LIMITS = {
    ("forward", "bfloat16"): (0.85, 1950),
    ("forward", "float32"): (0.85, 2800),
    ("backward", "bfloat16"): (1.50, 4200),
    ("backward", "float32"): (1.30, 8200),
}


# The compiler reads where to write its schedule as it is loaded: so it is loaded anew.
SCHEDULE = """
import sys, jax
from tests.aot import test_pallas_tpu as test
from tests.support import aot

jax.config.update("jax_enable_compilation_cache", False)
f, shapes = test.program(*test.DETECTOR, test.DTYPES[sys.argv[2]], sys.argv[1])
print(aot.compile_for(aot.devices("TPU v5e")[0], f, *shapes).as_text())
"""


@pytest.mark.parametrize(("mode", "dtype"), LIMITS)
def test_cycles(mode, dtype, tmp_path):
    """A bundle takes a cycle where nothing waits for memory, so a tile as many as its loop has."""
    options = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"
    command = [sys.executable, "-c", SCHEDULE, mode, dtype]
    environment = os.environ | {"LIBTPU_INIT_ARGS": options}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    cycles, bundles = LIMITS[mode, dtype]
    found = estimate(text)
    assert 0.5 * cycles < found.cycles / 1e6 <= cycles
    assert found.gathered == found.scattered == 0
    assert 0.5 * bundles < max(bundles_in_loops(tmp_path, f"deform_conv_{mode}")) <= bundles


def partitioned(f, shapes):
    """The program over four TPUs, the batch's arrays split along it."""
    mesh = Mesh(np.array(aot.devices("TPU v5e", 4)[:4]), ("data",))
    places = [P() if i == 1 else P("data") for i in range(len(shapes))]
    shapes = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, place))
        for shape, place in zip(shapes, places, strict=True)
    ]
    return jax.jit(f(mesh, tuple(places))).trace(*shapes).lower(lowering_platforms=("tpu",))


def test_in_shard_map_all_that_devices_exchange_is_the_kernel_s_gradient():
    """With its checks of what varies over the devices."""
    f, shapes = program((4, 25, 38, 128), (3, 3, 128, 128), jnp.bfloat16, "backward")
    results = P("data"), P(), P("data"), P("data")
    lowered = partitioned(lambda mesh, places: jax.shard_map(f, mesh=mesh, in_specs=places, out_specs=results), shapes)
    found = re.findall(r" (all-\w+|reduce-scatter|collective-\w+?)(?:-start)?\(", lowered.compile().as_text())
    assert found == ["all-reduce"]


def test_under_plain_jit_over_devices_it_says_what_to_do():
    f, shapes = program((4, 25, 38, 128), (3, 3, 128, 128), jnp.bfloat16, "backward")
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu' runs on one device.*inside jax\.shard_map"):
        partitioned(lambda *_: f, shapes)
