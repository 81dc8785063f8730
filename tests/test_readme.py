"""The README: its Python runs as it stands, and the files and targets that it names exist."""

import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.lenient
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n\n")[0].splitlines()[-1])
def test_a_python_block_runs_by_itself(block):
    plt.switch_backend("agg")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    plt.close("all")


def test_the_quickstarts_are_among_them():
    for layers in ("linen", "nnx"):
        (quickstart,) = [block for block in BLOCKS if f"from dcn_jax.{layers} import" in block]
        assert len(quickstart.strip().splitlines()) <= 12


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_has_the_targets_that_are_named():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for document in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
        assert {"test"} <= set(named) <= set(targets)
