"""`docs/site/docstrings.py`: formulas and tables of docstrings, as reStructuredText has them."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "docs" / "site" / "docstrings.py"
SPEC = importlib.util.spec_from_file_location("docstrings", PATH)
docstrings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(docstrings)

GIVEN = """\
One line.

    y = x

| here | there |
|---|---|
| `a` | b |

Args:
    x: of two
        lines.

    y: after an empty line.

Source: a paper."""

WANTED = """\
One line.

::

    y = x

.. list-table::
   :header-rows: 1

   * - here
     - there
   * - `a`
     - b

Args:
    x: of two
        lines.

    y: after an empty line.

Source: a paper.
"""


def test_formulas_tables_and_sections():
    assert "\n".join(docstrings.converted(GIVEN.splitlines())) == WANTED
