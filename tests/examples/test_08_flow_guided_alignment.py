"""`examples/08_flow_guided_alignment.py`: its film, its flow, and that the layer learns what the flow leaves."""

import importlib

import jax
import numpy as np
import pytest
from flax import nnx

program = importlib.import_module("08_flow_guided_alignment")
pytestmark = pytest.mark.lenient


@pytest.mark.slow
def test_flow_aligns_and_learning_aligns_better(run):
    none, flow, learned = (float(line.rsplit(" ", 1)[1]) for line in run("08_flow_guided_alignment", steps=12))
    assert flow < 0.5 * none
    assert learned < 0.7 * flow


def test_the_flow_leads_to_where_the_scene_was():
    """A frame is its predecessor, read where the flow says, but for what bilinear interpolation loses."""
    frames, flows = jax.jit(program.film)(jax.random.key(3))
    moved = jax.jit(jax.vmap(program.warp))(frames[:-1], flows[1:])
    inside = (slice(None), *[slice(program.BORDER, -program.BORDER)] * 2)
    np.testing.assert_allclose(moved[inside], frames[1:][inside], atol=0.05)
    assert np.abs(frames[1:] - frames[:-1])[inside].max() > 0.3


def test_a_fresh_layer_follows_the_flow_alone():
    """The scan over frames equals the mean of both predecessors, each moved by its flow."""
    frames, flows = jax.jit(program.film)(jax.random.key(3))
    model = program.Alignment(rngs=nnx.Rngs(0))
    aligned = jax.jit(lambda frames, flows: program.align(model, frames, flows))(frames, flows)
    one, two = (jax.jit(jax.vmap(program.warp))(f, i * flows[2:]) for i, f in ((1, frames[1:-1]), (2, frames[:-2])))
    # Both flows are the same everywhere, except where the flow before it is read outside of the picture.
    inside = (slice(None), *[slice(program.BORDER, -program.BORDER)] * 2)
    np.testing.assert_allclose(aligned[inside], ((one + two) / 2)[inside], atol=1e-5)
