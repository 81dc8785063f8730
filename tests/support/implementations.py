"""The implementations that the op's tests run over, what each can do, and how it is called on a CPU."""

import contextlib
import functools

from dcn_jax import deform_conv
from dcn_jax._core.pallas.launch import interpret

# "pallas_tpu" is not among them: it takes few of these calls (tests/ops/deform_conv/pallas_tpu/test_backend.py).
# What each can do beyond values and first gradients, in float32, of 1 and 2 spatial axes.
IMPLEMENTATIONS = {
    "xla": {"float64", "half", "complex", "rank 3", "forward_mode", "second_order", "export", "sharding", "shard_map"},
    # Not "shard_map" with its checks: Pallas's interpreter types its loops as varying over no device. Compiled, it does.
    "pallas_gpu": {"half", "rank 3", "forward_mode", "second_order", "sharding"},
}
ABILITIES = set.union(*IMPLEMENTATIONS.values())


@contextlib.contextmanager
def bound(name):
    """`deform_conv` by the implementation `name`, in which it can be called here."""
    with interpret() if name != "xla" else contextlib.nullcontext():
        yield functools.partial(deform_conv, implementation=name)
