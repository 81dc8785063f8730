"""Rows: what is measured of one workload, mode, dtype and implementation, as in the JSON file."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

STACKS = {"stack1": 1, "stack12": 12}  # in place of a workload: so many layers, which are compiled and not run

# Times are of one call. "dense" is the plain convolution, of a dcnv3 or dcnv4 the dense DCNv2, of a layer Flax's Conv; "peer" is the fastest
# peer. Each peer also has keys that begin with its name, such as torchvision_ms, torchvision_error and torchvision_peak_bytes.
EMPTY: dict[str, Any] = {
    "workload": None,  # its name in workloads.py, or a stack
    "implementation": None,
    "dtype": None,
    "mode": None,  # "forward" or "forward_backward"
    "ms": None,
    "dense_ms": None,
    "peer": None,
    "peer_ms": None,
    "compile_s": None,
    "scratch_bytes": None,
    "peak_bytes": None,  # arguments, results and scratch
    "parity": None,  # on a GPU, the largest relative error of result and gradients
    "dense_compile_s": None,
    "dense_scratch_bytes": None,
    "dense_peak_bytes": None,
    "peer_peak_bytes": None,
    "floor_ms": None,  # what a forward pass takes at the least, see floor.py
    "flops": None,  # per second of a matrix product, measured for the floor
    "bandwidth": None,  # bytes of memory read and written per second, measured for the floor
    "columns_bytes": None,  # of a convolution's im2col columns, which neither of ours makes
    "result_bytes": None,  # of the result, of other ops
    "tf32": None,  # whether the GPU may round the factors of float32 products
    "error": None,  # why this implementation has no figures
    "device": None,
    "processor": None,  # its name, of a CPU
    "jax": None,
}


def ratio(row: dict, above: str, below: str) -> float | None:
    """row[above] / row[below], where both were measured."""
    return row[above] / row[below] if row.get(above) is not None and row.get(below) else None


def ratios(rows: list[dict], above: str, below: str) -> list[float]:
    """The ratio of each row that has one."""
    return [r for row in rows if (r := ratio(row, above, below)) is not None]


def fastest(row: dict, peers: Iterable[str]) -> str | None:
    """Which of the peers takes the least time, or None where none was measured."""
    measured = [peer for peer in peers if row.get(f"{peer}_ms")]
    return min(measured, key=lambda peer: row[f"{peer}_ms"], default=None)


def geometric_mean(values: list[float]) -> float | None:
    """exp(mean(log(values))), or None of nothing."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def show(value: float | None, form: str = "{:.2f}") -> str:
    """A figure as text, or a dash where nothing was measured."""
    return "–" if value is None else form.format(value)


def spoken(mode: str) -> str:
    """The mode's name in a sentence."""
    return mode.replace("_", " + ")


def counted(stack: str) -> str:
    """A stack in words."""
    return "1 layer" if STACKS[stack] == 1 else f"{STACKS[stack]} layers"


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
