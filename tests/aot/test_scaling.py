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


@pytest.mark.lenient
def test_a_training_step_of_resnet_50():
    """Batch-sharded: sums alone, outside of loops, of no more than the gradients and the batch norms' statistics."""
    if reason := aot.missing("H100"):
        pytest.skip(reason)
    compiled = scaling.compile_training("batch", scaling.devices_of("H100"))
    found = read_collectives(compiled.as_text())
    assert {one.opcode for one in found} == {"all-reduce"}
    assert not any(one.in_loop for one in found)
    parameters, statistics = 25_557_032 + 27 * 9 * (4 * 128 + 6 * 256 + 3 * 512) + 13 * 27, 4 * 2 * 26_560
    summed = sum(one.nbytes for one in found)
    assert 2 * parameters < summed < 4 * (parameters + statistics)  # kernels of plain convolutions in bfloat16
    row = scaling.training_row("batch", compiled, flops=8e11)
    assert row["peak_bytes"] < 2e9
    assert 0.7 < row["efficiency"] < 1
