"""The batches of 11_many_devices.py: batch k depends on the random key and k alone, not on who makes it.

Each canvas has a key of its own, of its batch and its row, and is made by itself on the host, as a loader of files
would. So its bits are the same on any number of devices, and each process makes the rows of its own devices only.
"""

import functools

import jax
import numpy as np
from digits_data import CANVAS, POSITIONS, Digits, make_batch


@jax.jit
def make_canvas(key: jax.Array, batch: int, row: int, digits: Digits) -> tuple[jax.Array, jax.Array]:
    """A canvas `(1, 32, 32, 1)` and its labels `(1, 16, 16)`."""
    return make_batch(jax.random.fold_in(jax.random.fold_in(key, batch), row), digits, 1)


def global_batch(key: jax.Array, k: int, digits: Digits, size: int, sharding: jax.NamedSharding):
    """Batch k, its rows laid out by `sharding`: canvases `(size, 32, 32, 1)` and labels `(size, 16, 16)`."""
    with jax.enable_x64(False), jax.default_device(jax.local_devices(backend="cpu")[0]):

        @functools.cache
        def row(i):
            return [np.asarray(array) for array in make_canvas(key, k, i, digits)]

        def rows(part, index):
            return np.concatenate([row(i)[part] for i in range(size)[index[0]]])

        shapes = (size, CANVAS, CANVAS, 1), (size, POSITIONS, POSITIONS)
        return [
            jax.make_array_from_callback(shape, sharding, functools.partial(rows, part))
            for part, shape in enumerate(shapes)
        ]
