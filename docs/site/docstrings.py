"""From the library's docstrings to reStructuredText: formulas are indented there, and tables are Markdown's."""

import re
from collections.abc import Iterator, Sequence

SECTION = re.compile(r"(Args|Arguments|Inputs|Returns|Raises|Source|Example):$")
TABLE = re.compile(r"\|.*\|$")


def to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Sphinx's hook: change the lines of a docstring in place."""
    lines[:] = converted(lines)


def converted(lines: Sequence[str]) -> list[str]:
    """The lines, with formulas as literal blocks and tables as list-tables."""
    done, section = [], False
    for block in blocks(lines):
        section = SECTION.match(block[0]) is not None or (section and block[0].startswith(" "))
        if all(TABLE.match(line) for line in block):
            done += list_table(block)
        elif block[0].startswith("    ") and not section:
            done += ["::", "", *block]
        else:
            done += block
        done.append("")
    return done


def blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Runs of lines between empty ones."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def list_table(rows: Sequence[str]) -> list[str]:
    """A table of Markdown, whose second row only divides."""
    table = [".. list-table::", "   :header-rows: 1", ""]
    for row in [rows[0], *rows[2:]]:
        for column, cell in enumerate(row.strip("|").split("|")):
            table.append(f"   {'  ' if column else '* '}- {cell.strip()}")
    return table
