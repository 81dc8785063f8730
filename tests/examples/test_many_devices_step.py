"""`examples/many_devices_step.py`: what a step does where something is not finite."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import many_devices_step
import numpy as np
import pytest
from digits_data import CLASSES, make_batch
from many_devices_step import by_name, initial_state, make_optimizer, train_step


class Small(nn.Module):
    """The least that takes a canvas and labels its positions."""

    @nn.compact
    def __call__(self, canvas):
        return nn.Conv(CLASSES, (2, 2), strides=2)(canvas)


NETWORK = Small()
OPTIMIZER = make_optimizer(0.01, 5)
NONE = np.zeros(1, np.int32)
pytestmark = pytest.mark.lenient


step = jax.jit(functools.partial(train_step, NETWORK, OPTIMIZER))


@pytest.fixture(scope="module")
def batch(data):
    return make_batch(jax.random.key(0), data[0], 8)


@pytest.fixture(scope="module")
def start():
    return initial_state(NETWORK, OPTIMIZER, 0)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(batch, start):
    canvases, labels = batch
    good, _ = step(start, canvases, labels, NONE)
    good, metrics = step(good, canvases, labels, NONE)  # the first has a rate of zero
    assert np.isfinite(metrics.loss)
    assert metrics.finite.all()
    assert metrics.skipped.tolist() == [0, 0]

    state = good
    for i in (1, 2):
        state, metrics = step(state, canvases.at[3, 4, 5].set(np.nan), labels, np.array([0, 15], np.int32))
        assert np.isnan(metrics.loss)
        assert metrics.skipped.tolist() == [i, i]
        assert metrics.signal == 15
        assert not metrics.finite[[name for name, _ in by_name(state.params)].index("Conv_0/kernel")]
    jax.tree.map(np.testing.assert_array_equal, state.params, good.params)
    jax.tree.map(np.testing.assert_array_equal, state.optimizer.inner_state, good.optimizer.inner_state)
    assert state.step == good.step + 2  # the data go on

    state, metrics = step(state, canvases, labels, NONE)
    assert metrics.skipped.tolist() == [0, 2]
    expected, _ = step(good, canvases, labels, NONE)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


def test_a_loss_that_is_not_finite_is_enough(batch, start, monkeypatch):
    monkeypatch.setattr(many_devices_step, "loss_of", lambda scores, labels: jnp.inf + 0 * scores.sum())
    state, metrics = train_step(NETWORK, OPTIMIZER, start, *batch, NONE)
    assert np.isinf(metrics.loss)
    assert metrics.finite.all()
    assert metrics.skipped.tolist() == [1, 1]
    jax.tree.map(np.testing.assert_array_equal, state.params, start.params)


def test_the_first_parameters_are_the_same_in_float64(start):
    with jax.enable_x64(True):
        double = initial_state(NETWORK, OPTIMIZER, 0)
    for (name, array), (other_name, other) in zip(by_name(start.params), by_name(double.params), strict=True):
        assert (name, other.dtype) == (other_name, np.float64)
        np.testing.assert_array_equal(array, other)
    np.testing.assert_array_equal(start.key, double.key)
    assert not np.array_equal(start.key, initial_state(NETWORK, OPTIMIZER, 1).key)
