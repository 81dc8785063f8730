"""What make_interop.py computed: the cases' weights and inputs, made anew, and PyTorch's outputs, channels last."""

import json
from pathlib import Path

import numpy as np

from tests.support import seeded

_FILE = np.load(Path(__file__).parent / "data" / "interop.npz")
_X_SHAPES = json.loads(str(_FILE["x_shapes"]))
SHAPES = json.loads(str(_FILE["shapes"]))  # of each case's state, by PyTorch's names


def state(case):
    """PyTorch's state of a case."""
    return seeded.state(SHAPES[case])


def x(case):
    """The input of a case."""
    return np.moveaxis(seeded.uniform("x", _X_SHAPES[case]), 1, -1)


def y(case):
    """PyTorch's output of a case, in float64."""
    return _FILE[case]
