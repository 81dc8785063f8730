"""What torch computes for `grid_sample`, `affine_grid` and `ms_deform_attn`, with all gradients: tests/support/data/family.npz."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

FILE = np.load(Path(__file__).with_name("data") / "family.npz")
OPTIONS = json.loads(str(FILE["options"]))


class Case(NamedTuple):
    """One call, and what torch made of it: y and the gradients of its arguments."""

    arguments: list[np.ndarray]
    cotangent: np.ndarray
    expected: list[np.ndarray]


def read(op, number, names):
    """A stored case whose arguments go by `names`."""
    get = lambda name: FILE[f"{op}.{number}.{name}"]  # noqa: E731
    return Case([get(name) for name in names], get("cotangent"), [get("y"), *(get(f"d_{name}") for name in names)])


def compute(f, case, dtype):
    """y and the gradients, in `dtype`."""

    @jax.jit
    def run(arguments, cotangent):
        y, pull = jax.vjp(f, *arguments)
        return [y, *pull(cotangent)]

    return run([a.astype(dtype) for a in case.arguments], case.cotangent.astype(dtype))
