"""All examples: short, tested, and listed in their README."""

import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("[0-9]*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_in_150_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_program_has_a_test(path):
    assert (Path(__file__).parent / f"test_{path.name}").is_file()


def test_the_readme_lists_the_programs_in_order():
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\d\d_\w+\.py)\]\(\1\) \|", readme, re.MULTILINE) == [path.name for path in PROGRAMS]
