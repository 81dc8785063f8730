"""Imports run one way: each file of the package imports only from those above it in CONTRIBUTING's reading order."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dcn_jax"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
_, _LISTED = re.split(r"^## Reading order$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.M)
ORDER = re.findall(r"^(\S+\.py)\b", _LISTED.split("```")[1], flags=re.M)


def module_file(module):
    """The file of `dcn_jax.…`, or None where that is no module."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    found = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
    return found[0].relative_to(PACKAGE).as_posix() if found else None


def imported(source):
    """The files that a source imports from the package, wherever in it the import stands."""
    files = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it leads"
            # The name may be a module of the package that is imported from, or something in it.
            names = [
                whole if module_file(whole) else node.module
                for whole in (f"{node.module}.{alias.name}" for alias in node.names)
            ]
        else:
            continue
        files |= {module_file(name) for name in names if name.split(".")[0] == "dcn_jax"}
    return files


def runs_up(file, source):
    """The imports of `file` that do not lie above it."""
    return {other for other in imported(source) if ORDER.index(other) >= ORDER.index(file)}


def test_the_reading_order_is_complete():
    assert sorted(ORDER) == FILES


@pytest.mark.parametrize("file", FILES)
def test_no_import_runs_up(file):
    assert runs_up(file, (PACKAGE / file).read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from dcn_jax import sampling", {"sampling.py"}),
        ("from dcn_jax.sampling import locate", {"sampling.py"}),
        ("import dcn_jax.ops.deform_conv.api", {"ops/deform_conv/api.py"}),
        ("def f():\n    from dcn_jax.ops import deform_conv", {"ops/deform_conv/__init__.py"}),
        ("from dcn_jax._core import checks\nimport jax", set()),
    ],
)
def test_an_import_that_runs_up_is_found(source, found):
    """Wherever it stands, and however it is written."""
    assert runs_up("geometry.py", source) == found


@pytest.mark.parametrize(("layers", "others"), [("linen", "nnx"), ("nnx", "linen")])
def test_neither_kind_of_layers_imports_the_other(layers, others):
    for path in (PACKAGE / layers).glob("*.py"):
        assert not [file for file in imported(path.read_text(encoding="utf-8")) if file.startswith(others)]
