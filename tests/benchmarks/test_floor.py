"""The floor under a forward pass's time."""

import pytest

from benchmarks.floor import Rates, floor_ms
from benchmarks.workloads import WORKLOADS


def test_the_floor_is_the_tightest_of_three_bounds():
    work = WORKLOADS["small"]
    rates = {"flops": 1e30, "memory": 1e30, "cache": 1e30}
    products = floor_ms(work, "float32", Rates(**rates | {"flops": 1e9}))
    corners = floor_ms(work, "float32", Rates(**rates | {"cache": 1e9}))
    traffic = floor_ms(work, "float32", Rates(**rates | {"memory": 1e9}))
    positions = 8 * 32 * 32
    assert products == pytest.approx(1e-6 * 2 * positions * 9 * 32 * 32)
    assert corners == pytest.approx(1e-6 * positions * 9 * 32 * 4 * 4)
    assert traffic == pytest.approx(1e-6 * 4 * (positions * (32 + 18 + 9 + 32) + 9 * 32 * 32))
