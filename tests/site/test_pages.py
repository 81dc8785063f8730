"""The site in a browser, from files: it fits a telephone, asks for nothing, finds, shows formulas and the explorer."""

import html
import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.skipif(find_spec("sphinx") is None, reason="no site: make test-site makes and tries it")
ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "site"
PAGES = sorted(page.relative_to(SITE).as_posix() for page in SITE.rglob("*.html") if "_static" not in page.parts)
FIVE_MINUTES = "docs/five_minutes.html"


@pytest.fixture
def site(_browser):
    """The browser, at the site; afterwards its console has no error, and nothing came from elsewhere."""
    _browser.resize(1280, 950)
    _browser.prefer("light")
    yield _browser
    assert _browser.errors() == []
    assert [url for url in _browser.asked_for() if not url.startswith(SITE.as_uri())] == []


def test_the_site_is_there():
    assert FIVE_MINUTES in PAGES, "make docs first"


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("_modules")])
def test_a_page_fits_a_telephone(site, page):
    """No page scrolls sideways: what is wide scrolls by itself. Its pictures are there."""
    site.resize(360, 800)
    site.open(SITE / page)
    assert site.script("return document.documentElement.scrollWidth") <= 360
    missing = site.script("return [...document.images].filter((i) => i.complete && !i.naturalWidth).map((i) => i.src)")
    assert missing == []


def test_search_finds_offline(site):
    site.open(SITE / "search.html", "?q=modulated")
    found = "return [...document.querySelectorAll('#search-results li a')].map((link) => link.href)"
    site.until(lambda: len(site.script(found)) > 3)
    assert any(FIVE_MINUTES in link for link in site.script(found))


def test_formulas_are_drawn(site):
    site.open(SITE / FIVE_MINUTES)
    height = "return Math.min(...[...document.querySelectorAll('math')].map((m) => m.getBoundingClientRect().height))"
    assert site.script("return document.querySelectorAll('.formula math[display=block]').length") == 3
    assert site.script(height) > 5  # pixels
    assert "$" not in site.script("return document.querySelector('article').innerText")


def test_the_explorer_answers_in_the_page(site):
    site.open(SITE / FIVE_MINUTES)
    frame = site.find("iframe.explorer")
    site.script("arguments[0].scrollIntoView()", frame)
    site.driver.switch_to.frame(frame)
    try:
        site.until(lambda: site.script("return typeof dcn !== 'undefined'"))
        before = site.numbers()
        site.go((3, 5))
        site.until(lambda: site.numbers() != before)
    finally:
        site.driver.switch_to.default_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_screenshots(site, pictures, width, scheme):
    """To look at."""
    site.resize(width, 900)
    site.prefer(scheme)
    for page in ("index", "docs/five_minutes", "docs/keras", "api/dcn_jax.nnx", "examples/05_digits"):
        site.open(SITE / f"{page}.html")
        site.driver.save_screenshot(str(pictures / f"{page.replace('/', '-')}-{width}-{scheme}.png"))


def test_no_link_of_the_site_is_dead():
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', (SITE / page).read_text(encoding="utf-8"))) for page in PAGES}
    dead = []
    for page in PAGES:
        for link in re.findall(r'\bhref="([^"]+)"', (SITE / page).read_text(encoding="utf-8")):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            if re.match(r"\w+:", path) or page.startswith("_modules"):
                continue
            target = (SITE / page).parent / path.split("?")[0] if path else SITE / page
            name = target.resolve().relative_to(SITE).as_posix()
            if not target.is_file() or (anchor and name in anchors and anchor not in anchors[name]):
                dead.append((page, link))
    assert dead == []


@pytest.mark.parametrize("name", ["", "linen", "nnx", "keras", "interop", "models", "optim", "sharding", "viz"])
def test_every_public_name_has_an_entry(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    inventory = importlib.import_module("sphinx.util.inventory").InventoryFile
    known = {
        entry
        for entries in inventory.loads((SITE / "objects.inv").read_bytes(), uri="").data.values()
        for entry in entries
    }
    module = importlib.import_module(f"dcn_jax.{name}".removesuffix("."))
    names = getattr(module, "__all__", None) or {"optim": ["offset_labels"], "sharding": ["halo_deform_conv"]}[name]
    assert {f"{module.__name__}.{each}" for each in names} - known == set()


def test_the_modules_are_all_that_users_import():
    import dcn_jax

    assert {"keras", *dcn_jax._MODULES} == {"interop", "keras", "linen", "models", "nnx", "optim", "sharding", "viz"}
