"""How far `deform_conv` is from torchvision: its 62 results, with all gradients, of tests/support/data/torchvision.npz.

    python -m tests.support.parity

prints the worst deviation of each array in each dtype, as a share of the largest entry of what torchvision computed in
float64. In bfloat16 and float16 the offsets stay in float32 and the other inputs are numbers that these dtypes hold, so
that the arithmetic is measured and not the rounding of inputs.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.running import value_and_gradients

FILE = np.load(Path(__file__).with_name("data") / "torchvision.npz")
GEOMETRIES = json.loads(str(FILE["options"]))
ARGUMENTS = ("x", "kernel", "offset", "mask", "bias")


class Case(NamedTuple):
    """One call, and what torchvision made of it: y and the gradients d_x, d_kernel, …"""

    kind: str  # of its offset
    inputs: dict[str, np.ndarray]
    cotangent: np.ndarray
    expected: dict[str, np.ndarray]


def options(number):
    """The keyword arguments of `deform_conv` for a geometry."""
    g = GEOMETRIES[number]
    return {name: g[name] for name in ("strides", "padding", "kernel_dilation", "feature_group_count")}


def read(number):
    """The cases of a geometry, one for each kind of offset."""
    for kind in GEOMETRIES[number]["kinds"]:
        stored = _stored(f"{number}.") | _stored(f"{number}.{kind}.")
        inputs = {name: stored[name] for name in ARGUMENTS if name in stored}
        expected = {name: value for name, value in stored.items() if name == "y" or name.startswith("d_")}
        yield Case(kind, inputs, stored["cotangent"], expected)


def _stored(prefix):
    names = [key.removeprefix(prefix) for key in FILE.files if key.startswith(prefix)]
    return {name: FILE[prefix + name] for name in names if "." not in name}


def compute(op, number, dtype, jit=jax.jit):
    """What `op` makes of each case of a geometry, in `dtype`: pairs of a case and its results by name."""

    @jit
    def results_and_gradients(inputs, cotangent):
        y, (gradients,) = value_and_gradients(lambda inputs: op(**inputs, **options(number)), (inputs,), cotangent)
        return {"y": y} | {f"d_{name}": gradient for name, gradient in gradients.items()}

    for case in read(number):
        inputs = {name: jnp.asarray(value, dtype) for name, value in case.inputs.items()}
        if jnp.finfo(dtype).bits == 16:
            inputs["offset"] = jnp.asarray(case.inputs["offset"], jnp.float32)
        yield case, results_and_gradients(inputs, jnp.asarray(case.cotangent, dtype))


def deviation(actual, expected):
    """The largest difference, as a share of the largest expected entry."""
    if not expected.size:
        return 0.0
    return np.abs(np.asarray(actual, np.float64) - expected).max() / (np.abs(expected).max() or 1.0)


def main():
    """Print the table."""
    from dcn_jax import deform_conv

    names = ("y", *(f"d_{name}" for name in ARGUMENTS))
    print(f"{'dtype':10}" + "".join(f"{name:>10}" for name in names) + f"{'worst':>10}")
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        worst = dict.fromkeys(names, 0.0)
        with jax.enable_x64(dtype == "float64"):
            for number in range(len(GEOMETRIES)):
                for case, results in compute(deform_conv, number, dtype, jax.jit):
                    for name, value in results.items():
                        worst[name] = max(worst[name], deviation(value, case.expected[name]))
        print(f"{dtype:10}" + "".join(f"{value:10.1e}" for value in [*worst.values(), max(worst.values())]), flush=True)


if __name__ == "__main__":
    main()
