"""An op of another version of this library, timed: `PYTHONPATH=DIR python race_old.py FOLDER TASK`, called by race.py.

Reads inputs.npz in the folder and writes results.npz there; prints {"ms": …, "scratch": …}.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dcn_jax


def main() -> None:
    """Run one task."""
    folder, task = Path(sys.argv[1]), json.loads(sys.argv[2])
    with np.load(folder / "inputs.npz") as stored:
        arrays = [jnp.asarray(stored[name], dtype) for name, dtype in zip(stored.files, task["dtypes"], strict=True)]
    op, options = getattr(dcn_jax, task["op"]), task["options"]
    if task["op"] == "deform_conv":
        options |= {"implementation": "xla", "precision": task["precision"]}
    shapes = options.pop("spatial_shapes", None)

    def function(*arrays):
        first, *rest = arrays
        return op(first, *([] if shapes is None else [tuple(map(tuple, shapes))]), *rest, **options)

    def both(cotangent, *arrays):
        y, pull = jax.vjp(function, *arrays)
        return y, pull(cotangent)

    program = jax.jit(function if task["mode"] == "forward" else both).lower(*arrays).compile()
    results = jax.block_until_ready(program(*arrays))
    np.savez(folder / "results.npz", *(np.asarray(a, np.float32) for a in jax.tree.leaves(results)))
    times = []
    for _ in range(task["repeats"]):
        start = time.perf_counter()
        for _ in range(10):
            results = program(*arrays)
        jax.block_until_ready(results)
        times.append(100 * (time.perf_counter() - start))
    memory: Any = program.memory_analysis()
    print(json.dumps({"ms": statistics.median(times), "scratch": memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main()
