"""The Python of docs/keras.md runs as it stands."""

import pytest
from matplotlib import pyplot as plt

from tests.test_readme import ROOT, blocks

BLOCKS = blocks(ROOT / "docs" / "keras.md")


# What zeromodels' models warn of when they are made.
@pytest.mark.filterwarnings("ignore:Layer .* looks like it has unbuilt state", "ignore:.build.*was called on layer")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_python_block_runs_by_itself(block):
    plt.switch_backend("agg")
    exec(compile(block, "keras.md", "exec"), {"__name__": "page"})
    plt.close("all")
