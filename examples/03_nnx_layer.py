"""`dcn_jax.nnx.DeformConv` in a model: its parameters, a first call, and what `nnx.capture` sees.

The last line should be "the captures left the model as it was: True".
"""

from typing import Any

import jax
from flax import nnx

from dcn_jax.nnx import DeformConv


class Model(nnx.Module):
    """A plain convolution, then a deformable one: it takes the place of an `nnx.Conv`."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.deform = DeformConv(8, 16, (3, 3), strides=2, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """`(B, H, W, 3)` -> `(B, H / 2, W / 2, 16)`."""
        return nnx.relu(self.deform(nnx.relu(self.conv(images))))


def main() -> None:
    """Make the model, call it, look inside."""
    model = Model(rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))

    # `kernel` and `bias` are those of nnx.Conv. The convolution `offset_conv` sees the same input;
    # at each position it gives an offset (dy, dx) and a modulation of each of 9 taps: 27 channels.
    for path, parameter in nnx.to_flat_state(nnx.state(model.deform)):
        print(f"{'.'.join(map(str, path)):20}{parameter.shape}")

    features = nnx.jit(lambda model, images: model(images))(model, images)
    print(f"images {images.shape} -> features {features.shape}")

    # Only under nnx.capture does a layer hand over what it used, by its path in the model.
    before = jax.tree.structure(nnx.state(model))
    _, looked = nnx.capture(model, nnx.Intermediate)(images)
    seen: Any = looked["deform"]
    offset, mask = seen["offset"][0], seen["mask"][0]  # of the first call of the layer, here the only one
    print(f"offset {offset.shape}, all zero: {not offset.any()}; mask {mask.shape}, mean {mask.mean():.3f}")
    print(f"the captures left the model as it was: {jax.tree.structure(nnx.state(model)) == before}")


if __name__ == "__main__":
    main()
