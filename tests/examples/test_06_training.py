"""`examples/06_training.py`: the tap goes where the answer is, at a tenth of the learning rate."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

program = importlib.import_module("06_training")
pytestmark = pytest.mark.lenient


def test_a_tap_moves_towards_the_answer_and_the_error_falls(run):
    *errors, last = run("06_training", steps=150)
    plain, deformable = (float(line.rsplit(" ", 1)[1]) for line in errors)
    assert deformable < 0.8 * plain
    dy, dx = map(float, re.findall(r"-?\d+\.\d+", last))
    assert dy < -0.4
    assert dx > 0.2


def test_the_answer_is_the_pixel_further_up_and_right():
    images, answers = program.make_batch(jax.random.key(0), 2)
    assert images.shape == answers.shape == (2, 24, 24, 1)
    np.testing.assert_array_equal(answers[:, 3:, :-2], images[:, :-3, 2:])


def test_the_offset_branch_learns_at_a_tenth_of_the_rate():
    params = {"kernel": jnp.ones(3), "offset_conv": {"kernel": jnp.ones(3)}}
    optimizer = program.make_optimizer()
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params))
    np.testing.assert_allclose(updates["kernel"], -program.RATE, rtol=1e-3)  # Adam moves each parameter by its rate
    np.testing.assert_allclose(updates["offset_conv"]["kernel"], -0.1 * program.RATE, rtol=1e-3)
