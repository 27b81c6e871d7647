"""The guide builds without a warning, as a site that asks nothing of the network."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. A dead link, a page outside the navigation or a name that is not there fails the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= {page.relative_to(site) for page in site.rglob("*.html")}
    for page in pages:
        html = (site / page).read_text()
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]*", html), page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?https?:", style.read_text()), style


def test_formulas_are_mathml(site):
    sources = (ROOT / "docs" / "how_it_works.md").read_text().count("```math")
    assert sources == len(re.findall(r"<math[ >]", (site / "how_it_works.html").read_text())) > 5


def test_the_reference_shows_signatures_and_attributes(site):
    html = (site / "api" / "core.html").read_text()
    assert 'id="deqjax.core.solvers.anderson.Anderson"' in html and "ridge_mode" in html
