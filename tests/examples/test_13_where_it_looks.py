"""`examples/13_where_it_looks.py`: its pictures, after a training too short to learn anything."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digits_data import BACKGROUND

program = importlib.import_module("13_where_it_looks")
pytestmark = pytest.mark.lenient


@pytest.mark.slow
def test_it_draws_four_pictures(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = run("13_where_it_looks", Path("runs/where_it_looks"), steps=2, models=("dcnv1",), canvases=1)
    assert lines[0].startswith("dcnv1    mean IoU 0.")
    assert lines[1:] == ["pictures: runs/where_it_looks"]
    found = {path.stem for path in Path("runs/where_it_looks").glob("*.png") if path.stat().st_size > 5_000}
    assert found == set(program.PICTURES)
    assert all(f"{name}.png" in program.__doc__ for name in found)


def test_the_node_is_the_score_of_the_label_that_is_given():
    network = program.digits.Network("conv")
    variables = program.digits.init(network, jax.random.key(0), jnp.zeros((1, 32, 32, 1)))
    canvas = jax.random.normal(jax.random.key(1), (32, 32, 1))
    question = program.Question((network, variables), canvas, (3, 4))
    scores = network.apply(variables, canvas[None])[0]
    assert question.node[:2] == (3, 4)
    assert scores[question.node] == scores[3, 4].max()


def test_the_middle_of_a_digit_lies_on_it():
    labels = np.full((16, 16), BACKGROUND)
    labels[4:9, 6:9] = 7
    assert program.middle(labels) == (6, 7)
