"""`examples/07_plot_sampling.py`: its offsets, and that there is a picture."""

import importlib
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np

program = importlib.import_module("07_plot_sampling")


def test_it_draws_the_picture(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("07_plot_sampling", Path("runs/sampling.png")) == ["picture: runs/sampling.png"]
    assert Path("runs/sampling.png").read_bytes().startswith(b"\x89PNG")


def test_windows_are_spread_and_turned_the_more_the_further_down():
    offset = program.spread_and_turn(jnp.linspace(0, 1, program.SIZE))
    assert offset.shape == (32, 32, 18)
    first, last = np.asarray(offset).reshape(32, 32, 3, 3, 2)[[0, -1], 5]
    np.testing.assert_array_equal(first, 0)
    np.testing.assert_array_equal(last[1, 1], 0)  # the center of the window stays
    right = np.array([0, 1]) + last[1, 2]  # where the tap to its right went: turned by one radian, three times as far
    np.testing.assert_allclose(right, [-3 * math.sin(1), 3 * math.cos(1)], rtol=1e-5)
