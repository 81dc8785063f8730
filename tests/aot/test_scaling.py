"""What GPUs and TPUs would exchange to divide a layer (`make test-aot`)."""

import pytest

from benchmarks import scaling
from benchmarks.collectives import read_collectives
from tests.support import aot
from tests.support.scaling import KERNEL, LAYER, bytes_sent


def program(kind, name):
    """A way to divide a layer, compiled; skips the test where that compiler is not installed."""
    if reason := aot.missing(kind):
        pytest.skip(reason)
    return scaling.compile_way(scaling.WAYS[name], scaling.devices_of(kind), LAYER).as_text()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("H100", "batch × features, shard_map"),
        ("H100", "batch × channels, shard_map"),
        ("H100", "rows, halo_deform_conv"),
        ("TPU v5e", "features, shard_map"),
        ("TPU v5e", "rows, halo_deform_conv"),
    ],
)
def test_bytes_sent(kind, name):
    """Those that arithmetic says."""
    found = read_collectives(program(kind, name))
    assert sum(one.sent for one in found) == bytes_sent(scaling.TARGETS[kind])[name]
    assert not any(one.in_loop for one in found)


def test_fsdp_gathers_a_kernel_once():
    """And scatters its gradient: a device sends an eighth of it to each of the seven others, twice."""
    found = read_collectives(program("H100", "FSDP, gathered"))
    assert [one.opcode for one in found] == ["all-gather", "reduce-scatter"]
    assert sum(one.sent for one in found) == 2 * 7 / 8 * KERNEL
