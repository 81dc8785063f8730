"""The README and the pages in docs/: their Python runs as it stands, and the files and targets that they name exist."""

import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KERAS = ROOT / "docs" / "keras.md"  # its blocks need Keras, and run in tests/keras


def blocks(page):
    """The blocks of Python in a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


BLOCKS = [(page.name, block) for page in PAGES if page != KERAS for block in blocks(page)]


@pytest.mark.lenient
@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_a_python_block_runs_by_itself(page, block):
    plt.switch_backend("agg")
    exec(compile(block, page, "exec"), {"__name__": "page"})
    plt.close("all")


def test_the_quickstarts_are_among_them():
    for layers in ("linen", "nnx"):
        (quickstart,) = [
            block for page, block in BLOCKS if page == "README.md" and f"from dcn_jax.{layers} import" in block
        ]
        assert len(quickstart.strip().splitlines()) <= 12


def test_the_readme_can_be_read_at_one_go():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / "dcn_jax").rglob("*.md"), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)\)|<img src=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    links = [link or picture for link, picture in links]
    assert [link for link in links if not link.startswith("https://") and not (page.parent / link).exists()] == []


def test_make_has_the_targets_that_are_named():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for document in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE)
        assert {"test"} <= set(named) <= set(targets)
