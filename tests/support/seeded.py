"""Weights made anew from their names, the same in every version of NumPy, so that no file has to hold them.

Needs NumPy alone: data/make_interop.py imports it where torch is.
"""

import math
import zlib

import numpy as np


def uniform(name, shape):
    """Numbers in [-1, 1) that depend on the name alone. What PCG64 gives is fixed; what NumPy makes of it is not."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return ((raw >> np.uint64(11)) * 2.0**-52 - 1).reshape(shape)


def weight(name, shape):
    """A weight that keeps activations, offsets and logits near 1, by PyTorch's name of it; float32 holds it."""
    return _wide(name, shape).astype(np.float32).astype(np.float64)


def _wide(name, shape):
    numbers = uniform(name, shape)
    if name.endswith("running_var"):
        return 1 + numbers / 2
    if name.endswith(("bias", "running_mean")):
        return numbers / 4
    if len(shape) == 1:  # a batch norm's; small where it ends a residual branch
        return (1 + numbers / 4) * (0.3 if name.endswith("bn3.weight") else 1)
    return numbers * math.sqrt(6 / math.prod(shape[1:]))


def state(shapes):
    """{name: weight}, from {name: shape}."""
    return {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
