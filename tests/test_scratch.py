"""The scratch memory of the XLA implementation on the CPU, against the im2col columns (P · K · C) that it does not make."""

import jax
import jax.numpy as jnp
import pytest

from dcn_jax import deform_conv

LIMITS = {"forward": 0.30, "forward_backward": 0.75}


@pytest.mark.parametrize(("groups", "offset_groups"), [(1, 1), (4, 1), (1, 4)])
@pytest.mark.parametrize("mode", LIMITS)
def test_scratch(mode, groups, offset_groups):
    """Of a ResNet-50's conv4 in a detector, batch 8: compiled, not run."""
    images, height, width, channels, taps = 8, 50, 76, 256, 9
    shape = jax.ShapeDtypeStruct
    arguments = [
        shape((images, height, width, channels), jnp.float32),
        shape((3, 3, channels // groups, channels), jnp.float32),
        shape((images, height, width, offset_groups * taps * 2), jnp.float32),
        shape((images, height, width, offset_groups * taps), jnp.float32),
    ]

    def forward(*arrays):
        return deform_conv(*arrays, feature_group_count=groups, implementation="xla")

    def forward_backward(*arrays):
        y, pull = jax.vjp(forward, *arrays)
        return y, pull(y)

    program = jax.jit({"forward": forward, "forward_backward": forward_backward}[mode]).lower(*arguments).compile()
    columns = images * height * width * taps * channels * 4
    assert program.memory_analysis().temp_size_in_bytes <= LIMITS[mode] * columns
