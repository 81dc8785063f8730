"""The papers' picture: where the taps of some output positions read, over the image.

Here the offsets are made by hand, so that one knows what to expect: each 3×3 window is spread and
turned, the more the further down it is. In a model they are what the layer has sown (02 and 03).

The last line should be "picture: runs/sampling.png".
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib import pyplot as plt

from dcn_jax.viz import plot_sampling

SIZE = 32  # pixels along each side


def spread_and_turn(strength: jax.Array) -> jax.Array:
    """`(SIZE, SIZE, 18)`: offsets that take tap p to (1 + 2s) R(s) p, s the row's strength."""
    cos, sin = jnp.cos(strength), jnp.sin(strength)
    turn = jnp.array([[cos, -sin], [sin, cos]])  # (2, 2, SIZE)
    taps = jnp.stack(jnp.meshgrid(jnp.arange(-1.0, 2), jnp.arange(-1.0, 2), indexing="ij"), axis=-1)  # (3, 3, 2)
    moved = jnp.einsum("r,abr,hwb->rhwa", 1 + 2 * strength, turn, taps)  # (SIZE, 3, 3, 2)
    offset = moved - taps[None]  # (dy, dx) of each tap, for each row of the result
    return jnp.broadcast_to(offset.reshape(SIZE, 1, -1), (SIZE, SIZE, 18))


def main(path: Path) -> None:
    """Draw three positions, with a legend, and save the picture."""
    rows, columns = jnp.meshgrid(jnp.arange(1.0 * SIZE), jnp.arange(1.0 * SIZE), indexing="ij")
    image = jnp.sin(rows / 3.0) * jnp.sin(columns / 3.0)
    offset = spread_and_turn(jnp.linspace(0, 1, SIZE))
    mask = jnp.broadcast_to(jnp.linspace(0.2, 1, 9), (SIZE, SIZE, 9))  # the first tap weak, the last one strong

    figure, ax = plt.subplots(figsize=(6, 6), layout="constrained")
    plot_sampling(image, offset, mask, window=(3, 3), at=[(4, 6), (15, 15), (25, 24)], ax=ax)
    ax.legend(loc="upper right", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["runs/sampling.png"]))
