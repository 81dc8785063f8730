"""`examples/14_nnx_training.py`: it learns, and its offset convolution at the smaller rate."""

import importlib
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dcn_jax.optim import offset_labels

program = importlib.import_module("14_nnx_training")
pytestmark = pytest.mark.lenient


def test_it_learns(run):
    *losses, last = run("14_nnx_training", steps=60)
    assert len(losses) == 2
    assert int(re.fullmatch(r"after 60 steps (\d+) % of new images are named rightly", last)[1]) >= 90


def test_the_label_is_the_half_in_which_the_spot_lies():
    images, labels = program.make_batch(jax.random.key(0), 20)
    brightest = np.asarray(images[..., 0]).max(axis=1).argmax(axis=1)
    np.testing.assert_array_equal(labels, brightest >= 8)


def test_a_step_moves_the_branch_by_its_own_rate():
    model = program.Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.multi_transform({"main": optax.adam(1e-2), "offset": optax.adam(1e-3)}, offset_labels),
        wrt=nnx.Param,
    )
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    program.train_step(model, optimizer, *program.make_batch(jax.random.key(0)))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, nnx.state(model, nnx.Param))
    np.testing.assert_allclose(moved["conv2"]["offset_conv"]["kernel"][...], 1e-3, rtol=1e-2)
    np.testing.assert_allclose(moved["conv2"]["kernel"][...], 1e-2, rtol=1e-2)
