"""A training step in `flax.nnx`: a small network with a deformable layer, and a smaller rate for its offset convolution.

Run it with `python examples/14_nnx_training.py` (it needs Flax and Optax: `pip install -e ".[flax]"`, and takes a few
seconds). The network names the side on which a bright spot lies, whatever its place on that side. It prints the loss now
and then; the last line is like "after 200 steps 100 % of new images are named rightly".
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dcn_jax.nnx import DeformConv
from dcn_jax.optim import offset_labels


class Net(nnx.Module):
    """Two convolutions, of which the second is deformable, a mean over the map, and a readout."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.conv2 = DeformConv(8, 16, (3, 3), mask_scale=2.0, rngs=rngs)
        self.readout = nnx.Linear(16 * 4, 2, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images `(B, 16, 16, 1)` to logits `(B, 2)`."""
        features = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))  # (B, 8, 8, 16)
        quarters = nnx.avg_pool(features, (4, 4), strides=(4, 4))  # (B, 2, 2, 16)
        return self.readout(quarters.reshape(len(images), -1))


def make_batch(key: jax.Array, size: int = 32) -> tuple[jax.Array, jax.Array]:
    """Noise with a bright spot, and whether it lies in the right half."""
    noise_key, spot_key = jax.random.split(key)
    y, x = jax.random.randint(spot_key, (2, size), 1, 15)
    images = 0.1 * jax.random.normal(noise_key, (size, 16, 16, 1))
    images = images.at[jnp.arange(size), y, x].add(4.0)
    return images, (x >= 8).astype(jnp.int32)


@nnx.jit
def train_step(model: Net, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
    """One step of both rates, in place; returns the loss."""

    def loss_of(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def main(steps: int = 200) -> None:
    """Train, and print how often new images are named rightly."""
    model = Net(nnx.Rngs(0))
    rule = optax.multi_transform({"main": optax.adam(1e-2), "offset": optax.adam(1e-3)}, offset_labels)
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    for step in range(steps):
        loss = train_step(model, optimizer, *make_batch(jax.random.key(step)))
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.2f}")
    images, labels = make_batch(jax.random.key(steps), 512)
    right = jnp.mean(jnp.argmax(model(images), axis=-1) == labels)
    print(f"after {steps} steps {right:.0%} of new images are named rightly".replace("%", " %"))


if __name__ == "__main__":
    main()
