"""Offsets that no healthy network has, on a GPU: one compiled program for all of them."""

import numpy as np
import pytest

from tests.support import gpu, oracle
from tests.support.cases import draw

if reason := gpu.missing():
    pytest.skip(reason, allow_module_level=True)

CASE = draw((2, 6, 7, 16), (3, 3), 24, offset_groups=2, whole=0)
FAR = (np.inf, -np.inf, 1e30, -1e30, 2.0**31, -(2.0**31), 1e5, -3e38)
PRECISION, TOLERANCE = gpu.PRECISIONS["HIGHEST"]


def regular():
    """Where each tap reads without its offset: as the offsets' `(2, 6, 7, OG * K * 2)`."""
    geometry = oracle.Geometry((6, 7), (3, 3), 1, "SAME", 1)
    taps = np.stack([geometry.tap_positions(position) for position in np.ndindex(6, 7)])
    return np.broadcast_to(taps.reshape(6, 7, 1, 18), (2, 6, 7, 2, 18)).reshape(2, 6, 7, 36)


def hostile_offsets():
    """By name; what is changed is a fifth of all coordinates, or each."""
    rng, offset = np.random.default_rng(2), CASE.arrays[2]
    some = rng.random(offset.shape) < 0.2
    size = np.broadcast_to([6, 7], (18, 2)).reshape(36)
    border = np.where(rng.random(offset.shape) < 0.5, -1, size) - regular()
    last = np.where(rng.random(offset.shape) < 0.5, 0, size - 1) - regular()
    changed = {
        "far": np.where(some, rng.choice(FAR, offset.shape), offset),
        "all far": rng.choice(FAR, offset.shape),
        "integers": rng.integers(-3, 4, offset.shape),
        "just outside": np.where(some, border, offset),
        "on the last pixel": np.where(some, last, offset),
    }
    return {name: new.astype(np.float32) for name, new in changed.items()}


@pytest.mark.parametrize("implementation", ["pallas_gpu", "xla"])
def test_hostile_offsets(record_property, implementation):
    """And a NaN makes NaN of its own output alone, and in the gradients of what it was multiplied with."""
    x, kernel, given, mask, bias = CASE.arrays
    cotangent = gpu.draw_cotangent(CASE)
    program = gpu.gradients_of(gpu.bound(implementation, precision=PRECISION))
    compiled = gpu.compiled(program, CASE.arrays, cotangent)

    def run(offset):
        return gpu.named(compiled((x, kernel, offset, mask, bias), cotangent))

    for name, offset in hostile_offsets().items():
        wanted = gpu.exact(CASE._replace(arrays=(x, kernel, offset, mask, bias)), cotangent)
        gpu.check(record_property, name, run(offset), wanted, TOLERANCE)

    offset, far = given.copy(), given.copy()
    at = (1, 2, 3, 4)  # of the first offset group, the third tap
    offset[at], far[at] = np.nan, np.inf
    got, wanted = run(offset), gpu.exact(CASE._replace(arrays=(x, kernel, far, mask, bias)), cotangent)
    assert np.isnan(got["y"][1, 2, 3]).all()
    got["y"][1, 2, 3] = wanted["y"][1, 2, 3]
    got["doffset"][1, 2, 3, 4:6] = wanted["doffset"][1, 2, 3, 4:6]
    got["dmask"][1, 2, 3, 2] = wanted["dmask"][1, 2, 3, 2]
    got["dkernel"][0, 2, :8] = wanted["dkernel"][0, 2, :8]
    gpu.check(record_property, "NaN", got, wanted, TOLERANCE)
