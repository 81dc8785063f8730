"""`examples/15_explore.py`: the page of the network of 05_digits.py, in the documentation and after one step of training."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from tests.site.zoo import stored_layers

program = importlib.import_module("15_explore")
pytestmark = pytest.mark.lenient
DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_documentation_is_that_of_a_trained_network():
    text = (DOCS / "explorer.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 1e6
    layers = stored_layers(text)
    assert [layer["name"] for layer in layers] == ["Conv_0", "Conv_1", "layer_0", "layer_1", "layer_2"]
    assert [layer["before"] for layer in layers] == [None, 0, 1, 2, 3]
    assert np.abs(layers[-1]["offset"]).max() > 1  # at the start of training offsets are zero


def test_the_page_of_the_documentation_is_of_this_version():
    text = (DOCS / "explorer.html").read_text(encoding="utf-8")
    scripts = [html.split('<script type="module">')[1] for html in (text, program.explore().html)]
    assert scripts[0] == scripts[1], "run python examples/15_explore.py docs/explorer.html"


@pytest.mark.slow
def test_it_trains_and_saves(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("15_explore", Path("runs/explorer.html"), steps=1)
    layers = stored_layers(Path("runs/explorer.html").read_text(encoding="utf-8"))
    assert [layer["name"] for layer in layers] == ["Conv_0", "Conv_1", "layer_0", "layer_1", "layer_2"]
