"""Two workloads that take no time, on a device of known rates."""

import pytest

from benchmarks import measure
from benchmarks.convolution import Convolution
from benchmarks.floor import Rates
from benchmarks.workloads import WORKLOADS


@pytest.fixture
def tiny(monkeypatch):
    """The workload "tiny"; "tiny-1d" is there too."""
    work = Convolution((1, 4, 5, 2), 3)
    monkeypatch.setitem(WORKLOADS, "tiny", work)
    monkeypatch.setitem(WORKLOADS, "tiny-1d", Convolution((1, 6, 2), 3, window=(3,)))
    monkeypatch.setattr(measure, "measure_rates", lambda *_: Rates(1e9, 1e9, 1e9))
    return work
