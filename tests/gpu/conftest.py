"""On a real GPU: the kernels compiled, and not interpreted."""

import pytest

from tests.support import gpu


@pytest.fixture(autouse=True)
def _mode(optimized):
    with gpu.mode():
        yield
