"""A page in which one drags a position over a digit, and sees where a trained network reads.

It trains the network with modulated deformable layers of 05_digits.py, on one picture writes what
its layers read and used into a page, and needs a minute. The page is one file that any browser
opens. That of the documentation is made by

    python examples/15_explore.py docs/explorer.html

The last line should be "page: runs/explorer.html, 0.6 MB".
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from digits_data import load_digits
from digits_picture import pictured_canvases

from dcn_jax.viz import explore

digits: Any = importlib.import_module("05_digits")  # a name that begins with a digit


def main(path: Path, steps: int = 800) -> None:
    """Train, run the network on the largest of the pictured digits, and save its page."""
    data = load_digits()
    run = digits.train("dcnv2", 0, data, steps=steps, batch=16, learning_rate=0.01, report=lambda loss: None)
    canvases, _ = pictured_canvases(data[1])
    page = explore((run.network, run.variables), canvases[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    print(f"page: {path}, {page.size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["runs/explorer.html"]))
