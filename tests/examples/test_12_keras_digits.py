"""`examples/12_keras_digits.py`: trained a little, saved, and loaded again. `make test-keras` runs it."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras", reason="Keras has an environment of its own: make test-keras")
pytestmark = [
    pytest.mark.lenient,
    # What Keras itself does, when NumPy reads its variables and when it sees int64.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype int64 requested in ShapeDtypeStruct:UserWarning"),
]


def test_the_same_scores_after_loading(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *lines, last = run("12_keras_digits", Path("runs/keras_digits.keras"), steps=30)
    assert last.endswith("the same scores")
    accuracies = [float(each) for each in re.findall(r": (\d+\.\d)% of the positions", "\n".join(lines))]
    assert len(accuracies) == 2


def test_only_branches_are_slow():
    program = importlib.import_module("12_keras_digits")
    layer = program.DeformConv2D(2, 3)
    layer.build((None, 8, 8, 2))
    before = [weight.numpy() for weight in layer.weights]
    optimizer = program.SlowBranches(0.1, weight_decay=0.0)
    optimizer.build(layer.trainable_variables)
    optimizer.apply([np.ones_like(old) for old in before], layer.trainable_variables)
    moved = {
        weight.path: np.abs(weight.numpy() - old).mean() for weight, old in zip(layer.weights, before, strict=True)
    }
    for path, step in moved.items():  # Adam moves each weight by its rate
        np.testing.assert_allclose(step, 0.01 if "offset_conv" in path else 0.1, rtol=1e-3)
