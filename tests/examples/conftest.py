"""What the tests of the examples share: running one, and the digits.

`pythonpath` in pyproject.toml holds their folder; a name that begins with a digit needs importlib.
"""

import importlib
import re

import digits_data
import digits_scores
import matplotlib
import pytest

matplotlib.use("Agg")


def form(line):
    """The line, each number in it replaced by a sign."""
    return re.sub(r"-?\d+(\.\d+)?", "#", line)


@pytest.fixture
def run(capsys):
    """Runs an example and gives the lines it prints, the last as its docstring promises."""

    def run(name, *args, **options):
        program = importlib.import_module(name)
        program.main(*args, **options)
        lines = capsys.readouterr().out.splitlines()
        (promised,) = re.findall(r'last line (?:should be|is like)\s"([^"]+)"', program.__doc__)
        assert form(lines[-1]) == form(promised)
        return lines

    return run


@pytest.fixture(scope="session")
def data():
    """Digits to train on, and digits to test with."""
    return digits_data.load_digits()


@pytest.fixture(autouse=True)
def _few_test_canvases(monkeypatch):
    monkeypatch.setattr(digits_scores, "TEST_CANVASES", digits_scores.TEST_BATCH)
