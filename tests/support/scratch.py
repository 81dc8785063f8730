"""How much memory a compiled call needs beside its arguments and results, as a share of the columns of an im2col."""

import functools

import jax
import jax.numpy as jnp

from benchmarks.convolution import Convolution
from tests.support.running import value_and_gradients

# Of the columns, P · K · C numbers: of float32, and of bfloat16, of which a CPU makes float32
LIMITS = {"forward": 0.30, "forward + backward": 0.75}
NARROW_LIMITS = {"forward": 0.60, "forward + backward": 1.2}

# A ResNet-50's conv4 in a detector, batch 8: its channels together, convolved in groups, and read in groups
DETECTOR = {
    "dense": Convolution((8, 50, 76, 256), 256),
    "groups": Convolution((8, 50, 76, 256), 256, groups=4),
    "offset groups": Convolution((8, 50, 76, 256), 256, offset_groups=4),
}


def share(compile, workload, mode, dtype=jnp.float32):
    """Bytes of scratch over those of the columns; `compile(f, *shapes)` gives a compiled program. Nothing runs."""
    shapes = workload.shapes(dtype)
    forward = functools.partial(workload.call, implementation="xla")
    if mode == "forward":
        program = compile(forward, *shapes)
    else:
        program = compile(functools.partial(value_and_gradients, forward), shapes, jax.eval_shape(forward, *shapes))
    return program.memory_analysis().temp_size_in_bytes / workload.sizes(dtype)["columns_bytes"]
