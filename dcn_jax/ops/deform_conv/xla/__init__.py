"""The op in `jax.numpy`, everywhere."""
