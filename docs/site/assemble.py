"""The sources of the site: the repository's own pages, where they lie, and pages of its programs and modules.

    python docs/site/assemble.py build/site-source

A page keeps its path, so that its links lead where they lead in the repository. A link to a
program leads to the program's page, and one to any other file to a copy of it.
"""

import ast
import importlib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "examples/README.md", "dcn_jax/**/*.md")
MODULES = ("", "linen", "nnx", "keras", "interop", "models", "optim", "sharding", "viz")  # of dcn_jax
ABOUT = {  # what a module's page says first, where the module's own line is not enough
    "": "The ops. They take and return arrays of JAX.",
    "linen": "Layers for `flax.linen`.",
    "nnx": "Layers for `flax.nnx`, and `deformify`, which puts them into a model.",
}
PICTURES = {  # which pictures of docs/ a program draws
    "05_digits": ("sampling",),
    "10_find_digits": ("find_digits",),
    "13_where_it_looks": ("receptive_field", "effective_sampling", "sampling_through", "saliency_region"),
}


def assemble(target: Path) -> None:
    """Write all sources into an empty folder."""
    shutil.rmtree(target, ignore_errors=True)
    for pattern in PAGES:
        for page in sorted(ROOT.glob(pattern)):
            write(target / page.relative_to(ROOT), to_pages(page))
            copy_what_it_links_to(page, target)
    for program in sorted((ROOT / "examples").glob("*.py")):
        shutil.copy(program, target / "examples")
        write(target / "examples" / f"{program.stem}.md", program_page(program))
    for name in MODULES:
        module = importlib.import_module(f"dcn_jax.{name}".removesuffix("."))
        write(target / "api" / f"{module.__name__}.md", module_page(module, ABOUT.get(name)))
    write(target / "index.md", (ROOT / "docs" / "site" / "index.md").read_text(encoding="utf-8"))
    explorer = (ROOT / "docs" / "explorer.html").read_text(encoding="utf-8")
    write(target / "whole" / "docs" / "digits_explorer.html", explorer)  # explorer.html is the page of explorer.md


def write(path: Path, text: str) -> None:
    """A file of text, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def to_pages(page: Path) -> str:
    """The text of a page whose links to programs, and to folders, lead to their pages."""

    def page_of(link: re.Match) -> str:
        path = (page.parent / link[1]).resolve()
        if path.parent == ROOT / "examples" and path.suffix == ".py":
            return f"]({link[1].removesuffix('.py')}.md)"
        return f"]({link[1].rstrip('/')}/README.md)" if path.is_dir() else link[0]

    return re.sub(r"\]\(([^)#\s]+)\)", page_of, page.read_text(encoding="utf-8"))


def copy_what_it_links_to(page: Path, target: Path) -> None:
    """The files, no pages, to which a page links, or which it shows."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)|<img src=\"([^\"]+)\"", text):
        path = (page.parent / "".join(link)).resolve()
        if path.is_file() and path.suffix != ".md" and path.is_relative_to(ROOT):
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def program_page(program: Path) -> str:
    """A program's page: what its docstring says, the pictures that it draws, and its code."""
    docstring = ast.get_docstring(ast.parse(program.read_text(encoding="utf-8")))
    assert docstring, f"{program} has no docstring"
    pictures = [f"![What it draws](../docs/{name}.png)" for name in PICTURES.get(program.stem, ())]
    code = f"```{{literalinclude}} {program.name}\n:language: python\n```"
    return "\n\n".join([f"# {program.name}", docstring, *pictures, code]) + "\n"


def public_names(module: ModuleType) -> list[str]:
    """What a module offers: its `__all__`, or its own functions and classes."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = inspect.getmembers(module, lambda value: getattr(value, "__module__", None) == module.__name__)
    return [
        name
        for name, value in own
        if not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value))
    ]


def own_methods(kind: type) -> list[str]:
    """`__call__`, and the public methods that no class from elsewhere has."""
    elsewhere = [base for base in kind.__mro__ if not base.__module__.startswith("dcn_jax")]
    taken = {name for base in elsewhere for name in vars(base)}
    methods = inspect.getmembers(
        kind, lambda value: inspect.isfunction(value) and value.__module__.startswith("dcn_jax")
    )
    return [name for name, _ in methods if name == "__call__" or not (name.startswith("_") or name in taken)]


def module_page(module: ModuleType, about: str | None) -> str:
    """The page of a module: each public name, from its docstring."""
    entries = []
    for name in public_names(module):
        value, entry = getattr(module, name), f".. autofunction:: {module.__name__}.{name}"
        if inspect.isclass(value):
            entry = f".. autoclass:: {module.__name__}.{name}"
            if methods := own_methods(value):
                entry += f"\n   :members: {', '.join(methods)}"
        entries.append(f"```{{eval-rst}}\n{entry}\n```")
    return "\n\n".join([f"# {module.__name__}", about or (module.__doc__ or "").partition("\n\n")[0], *entries]) + "\n"


if __name__ == "__main__":
    os.environ.setdefault("KERAS_BACKEND", "jax")
    assemble(Path(sys.argv[1]))
