"""`examples/digits_network.py`: its networks and their loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digits_data import BACKGROUND, make_batch
from digits_network import Network, init, loss_of

pytestmark = pytest.mark.lenient


@pytest.mark.parametrize("model", ["dcnv1", "dcnv2"])
def test_a_fresh_deformable_network_is_the_plain_one(model, data):
    canvases, _ = make_batch(jax.random.key(0), data[0], 2)
    plain, deformable = Network("conv"), Network(model)
    variables = init(deformable, jax.random.key(1), canvases[:1])
    without_branches = {
        name: {key: value for key, value in layer.items() if key != "offset_conv"}
        for name, layer in variables["params"].items()
    }
    expected = jax.jit(plain.apply)({"params": without_branches}, canvases)
    assert expected.shape == (2, 16, 16, 11)
    np.testing.assert_allclose(jax.jit(deformable.apply)(variables, canvases), expected, atol=1e-4)


def test_the_loss_weighs_digits_fourfold():
    scores = jnp.zeros((1, 1, 2, 11)).at[..., 3].set(2.0)
    wrong, right = (float(jax.nn.logsumexp(scores[0, 0, 0])) - s for s in (0, 2))
    loss = loss_of(scores, jnp.array([[[BACKGROUND, 3]]]))
    assert float(loss) == pytest.approx((wrong + 4 * right) / 5, rel=1e-6)
