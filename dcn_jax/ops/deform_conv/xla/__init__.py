"""The op in `jax.numpy`, on every platform. Read `backend`, `schedule`, `blocks`, `one_tap`, then the other algorithms."""
