"""How many functions a stranger passes from `deform_conv` to the matrix product on a CPU, and through which files."""

import itertools
import traceback
from pathlib import Path

import jax
from jax.extend.core import Primitive

import dcn_jax
from tests.support.running import normal

PACKAGE = Path(dcn_jax.__file__).parent
MOST = 12


def frames():
    """(file, function) of every frame of the package on the stack, the outermost first."""
    stack = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    return [(file.relative_to(PACKAGE).as_posix(), name) for file, name in stack if PACKAGE in file.parents]


def walk(monkeypatch):
    """The frames from `deform_conv` to the op's primitive, and those from its lowering to the product, the last that is traced."""
    at, bind = {}, Primitive.bind

    def note(primitive, *arrays, **params):
        if primitive.name in ("platform_op", "dot_general"):
            at[primitive.name] = frames()
        return bind(primitive, *arrays, **params)

    monkeypatch.setattr(Primitive, "bind", note)
    x, kernel, offset = normal(1, 8, 8, 4), normal(3, 3, 4, 2), normal(1, 8, 8, 18)
    jax.clear_caches()
    jax.jit(dcn_jax.deform_conv).lower(x, kernel, offset)
    return at["platform_op"], at["dot_general"]


def test_the_way_is_short(monkeypatch):
    down, product = walk(monkeypatch)
    assert (down[0], product[0]) == (("ops/deform_conv/api.py", "deform_conv"), ("_core/platform_op.py", "_lower"))
    assert len(down) + len(product) <= MOST, "\n".join(map(str, down + product))


def test_no_file_is_entered_twice(monkeypatch):
    """A call goes down and never comes back."""
    files = [file for file, _ in itertools.groupby(file for frames in walk(monkeypatch) for file, _ in frames)]
    assert len(files) == len(set(files)), files
