"""`dcn_jax.linen.DeformConv` in a model: its parameters, a first call, and what it sows.

The last line should be "the mask's mean is 0.500: a fresh layer reads at half strength".
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dcn_jax.linen import DeformConv


class Model(nn.Module):
    """A plain convolution, then a deformable one: it takes the place of an `nn.Conv`."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, 3)` -> `(B, H / 2, W / 2, 16)`."""
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        return nn.relu(DeformConv(16, (3, 3), strides=2, name="deform")(x))


def main() -> None:
    """Make the model, call it, look inside."""
    model = Model()
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)

    # `kernel` and `bias` are those of nn.Conv. The convolution `offset_conv` sees the same input;
    # at each position it gives an offset (dy, dx) and a modulation of each of 9 taps: 27 channels.
    for path, shape in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(jnp.shape, variables["params"]["deform"]), is_leaf=lambda node: isinstance(node, tuple)
    ):
        print(f"{jax.tree_util.keystr(path, simple=True, separator='/'):20}{shape}")

    # Nothing but `mutable` changes when one wants to see where the layer looked.
    features, sown = jax.jit(lambda v, x: model.apply(v, x, mutable="intermediates"))(variables, images)
    seen = sown["intermediates"]["deform"]
    offset, mask = seen["offset"][0], seen["mask"][0]  # of the first call of the layer, here the only one
    print(f"images {images.shape} -> features {features.shape}")
    print(f"offset {offset.shape}, all zero: {not offset.any()}; mask {mask.shape}")
    print(f"the mask's mean is {mask.mean():.3f}: a fresh layer reads at half strength")


if __name__ == "__main__":
    main()
