"""The explorer's page: its files, put into one that needs no other and no network."""

import base64
import functools
import html
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

LARGE = 20e6  # bytes

_FILES = resources.files("dcn_jax.viz") / "explorer"
_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const) (\w+))", re.MULTILINE)


class Page:
    """One page, as text: `html`. A notebook shows it, and `save` writes it."""

    def __init__(self, data: Any):
        self.html = _fill(data)

    @property
    def size(self) -> int:
        """Bytes that the page takes."""
        return len(self.html.encode())

    def save(self, path: str | os.PathLike, *, large: bool = False) -> Path:
        """Write the page, which opens from the file in any browser, and return its path.

        Args:
            path: of the file, "explorer.html".
            large: write it even if it takes more than 20 MB.

        Raises:
            ValueError: it takes more than 20 MB, and `large` is False.
        """
        if self.size > LARGE and not large:
            raise ValueError(self._too_large())
        path = Path(path)
        path.write_text(self.html, encoding="utf-8")
        return path

    def _too_large(self) -> str:
        return (
            f"the page takes {_megabytes(self.size)}; make it smaller by explore(…, channels=16), "
            'dtype="float16" or a smaller image, or write it as it is by save(path, large=True)'
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame, or a sentence if it takes more than 20 MB."""
        if self.size > LARGE:
            return f"<p>{html.escape(self._too_large())}</p>"
        style = "width: 100%; height: 56rem; border: 0"
        return f'<iframe title="explorer" style="{style}" srcdoc="{html.escape(self.html)}"></iframe>'

    def __repr__(self) -> str:
        """Its size."""
        return f"<Page of {_megabytes(self.size)}; page.save('explorer.html') writes it>"


def pack(array: Any, dtype: Any) -> dict[str, Any] | None:
    """An array as the page's arrays.js reads it; None stays None."""
    if array is None:
        return None
    array = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    return {"dtype": np.dtype(dtype).name, "shape": array.shape, "base64": base64.b64encode(array.tobytes()).decode()}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _fill(data: Any) -> str:
    """The page with its style, its program and the data."""
    stored = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", r"\u003c")
    page = _read("page.html")
    for tag, content in (
        ('<link rel="stylesheet" href="style.css">', f"<style>\n{_read('style.css')}</style>"),
        ('<script type="module" src="main.js"></script>', f'<script type="module">\n{_program()}</script>'),
        ('id="dcn-data">null<', f'id="dcn-data">{stored}<'),
    ):
        before, found, after = page.partition(tag)
        assert found, tag
        page = before + content + after
    return page


@functools.cache
def _read(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


@functools.cache
def _program() -> str:
    """main.js and all that it imports, as one script: a page from a file may not import."""
    done: dict[str, str] = {}
    _wrap("main", done)
    return "\n".join(done.values())


def _wrap(name: str, done: dict[str, str]) -> None:
    """Add module `name` to `done`, after those that it imports, each a function that returns what it exports."""
    source = _read(f"{name}.js")
    for _, imported in _IMPORT.findall(source):
        if imported not in done:
            _wrap(imported, done)
    exports = ", ".join(_EXPORT.findall(source))
    body = _EXPORT.sub("", _IMPORT.sub(r"const {\1} = $\2;\n", source))
    done[name] = f"const ${name} = (() => {{\n{body}return {{ {exports} }};\n}})();"
