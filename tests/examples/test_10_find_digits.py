"""`examples/10_find_digits.py`: its canvases, its peaks, its score, and that it learns to find."""

import importlib
import re
from pathlib import Path

import find_digits_canvas
import jax
import jax.numpy as jnp
import numpy as np
import pytest

program = importlib.import_module("10_find_digits")
pytestmark = pytest.mark.lenient


@pytest.mark.slow
def test_it_learns_to_find_digits_and_draws_where_it_looks(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/find_digits.png")
    step, last = run("10_find_digits", path, steps=60, tests=64)
    assert step.startswith("step   50: loss ")
    digits, found, named = map(float, re.findall(r"\d+\.\d|\d+", last)[:3])
    assert 128 <= digits <= 256
    assert found > 70
    assert named > 40
    assert path.stat().st_size > 10_000


@pytest.mark.slow
def test_a_canvas_is_blank_where_no_digit_is(data):
    images, kinds, centers = find_digits_canvas.make_canvases(jax.random.key(0), data[0], 64)
    count = (kinds != find_digits_canvas.NONE).sum(1)
    assert set(count.tolist()) == {2, 3, 4}
    pixels = np.stack(np.meshgrid(*[(np.arange(32) + 0.5) / 32] * 2, indexing="ij"), axis=-1)  # (32, 32, 2)
    distance = np.linalg.norm(pixels[:, :, None] - centers[:, None, None], axis=-1)  # (B, 32, 32, 4)
    # A digit of up to 16 pixels, whichever way it is turned, is within 0.4 of its center.
    covered = ((distance < 0.4) & (kinds != find_digits_canvas.NONE)[:, None, None]).any(-1)
    assert not images[..., 0][~covered].any()
    assert images.max() <= 1


def test_a_peak_is_likely_and_likelier_than_around_it():
    logits = np.full((1, 16, 16, 10), -9.0, np.float32)
    logits[0, 3, 4, 7], logits[0, 3, 5, 2], logits[0, 3, 6, 2] = 2, 1, 3  # its neighbour is not a peak, the next is
    logits[0, 10, 10, 5] = -1  # less than 0.3
    peaks, names = program.find(jnp.asarray(logits))
    assert np.argwhere(peaks[0]).tolist() == [[3, 4], [3, 6]]
    assert (names[0, 3, 4], names[0, 3, 6]) == (7, 2)


def test_the_score_counts_what_is_near_and_what_is_named():
    peaks, names = np.zeros((1, 16, 16), bool), np.zeros((1, 16, 16), int)
    for row, column, kind in ((3, 3, 5), (3, 12, 1), (12, 3, 2)):
        peaks[0, row, column], names[0, row, column] = True, kind
    # One right, one with the wrong name, one with its peak two pixels off, and no digit.
    places = np.array([[[3.5, 4.5], [3.5, 12.5], [12.5, 5.5], [12, 12]]]) / 16
    canvases = program.Canvases(np.zeros((1, 32, 32, 1)), np.array([[5, 7, 2, program.NONE]]), places)
    assert program.score(peaks, names, canvases) == (3, pytest.approx(2 / 3), pytest.approx(1 / 3))
