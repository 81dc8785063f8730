"""Pages in a real browser: headless Chromium, driven by Selenium. Without one of them these tests are skipped.

They are slow, so that `make test` needs no browser; `make test-site` runs them. Pictures of the pages go to runs/site/.
"""

import shutil
from pathlib import Path

import pytest

from tests.site.browser import Browser

PICTURES = Path(__file__).parents[2] / "runs" / "site"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def _browser(tmp_path_factory):
    pytest.importorskip("selenium", reason='no Selenium: pip install "dcn-jax[site]"')
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no Chromium: on Debian, apt install chromium chromium-driver")
    browser = Browser(*programs, downloads=tmp_path_factory.mktemp("downloads"))
    yield browser
    browser.quit()


@pytest.fixture
def browser(_browser):
    """The browser, wide and light; afterwards its console must be silent, and no page may have asked for anything."""
    _browser.resize(1280, 950)
    _browser.prefer("light")
    yield _browser
    assert _browser.messages() == []
    assert _browser.asked_for() == []


@pytest.fixture(scope="session")
def pictures():
    """The folder for screenshots."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    return PICTURES
