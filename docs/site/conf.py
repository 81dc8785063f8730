"""Sphinx: the book theme, Markdown by MyST, the API from the docstrings; nothing comes from the network."""

import inspect
import os
import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml
from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("KERAS_BACKEND", "jax")  # before the API page loads Keras

import docstrings

import dcn_jax

project = "dcn_jax"
version = release = dcn_jax.__version__
copyright = "the dcn_jax developers"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4
exclude_patterns = ["whole"]

autodoc_typehints = "none"  # the docstrings say what arguments are
autodoc_preserve_defaults = True  # as the source spells them
toc_object_entries_show_parents = "hide"
napoleon_custom_sections = ["Source", ("Inputs", "params_style")]
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # of the options of a linen layer, a list
default_role = "code"  # of `name` in a docstring
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "dcn_jax"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search stands above the list of pages
}
html_extra_path = ["../../build/site-source/whole"]  # the explorer, which pages show in a frame
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # a page from a file may not fetch another
html_context = {"default_mode": "auto"}  # light or dark, as the system is
html_math_renderer = "mathml"


def inline_math(translator, node):
    """A formula in a line, as MathML, which browsers draw without a program."""
    translator.body.append(latex2mathml.tex2mathml(node.astext()))
    raise SkipNode


def block_math(translator, node):
    """A formula of its own."""
    translator.body.append(f'<div class="formula">{latex2mathml.tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


SPELLINGS = {  # of what stands in signatures
    r", parent=<.*?>, name=None": "",  # Flax's own
    r"<class 'jax\.numpy\.(\w+)'>": r"jnp.\1",
    r"<function (\w+)(\.<locals>\.\w+)?>": r"\1",
}


def signature_of(app, what, name, obj, options, signature, returns):
    """What a class is made with: of a Keras layer that of `__init__`, of a linen layer without what Flax adds."""
    if signature == "(*args, **kwargs)":
        signature = stringify_signature(inspect.signature(obj.__init__.__get__(obj)), show_annotation=False)
    for shown, wanted in SPELLINGS.items():
        signature = re.sub(shown, wanted, signature or "")
    return signature, returns


def setup(app):
    """What Sphinx asks of this file."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("autodoc-process-signature", signature_of)
    app.connect("autodoc-process-docstring", docstrings.to_rst, priority=400)  # before napoleon, at 500
