"""The documents as a site: it builds without a warning, its links and anchors lead somewhere, and it loads nothing."""

import html.parser
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.parse

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

PARTS = (
    "README.md",
    "BUILD.md",
    "CITATION.cff",
    "mkdocs.yml",
    "docs",
    "examples",
    "experiments",
    "findings",
    "scripts",
)


def build(root, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("site")
    done = build(ROOT, directory)
    assert done.returncode == 0, done.stderr
    return directory


class Page(html.parser.HTMLParser):
    """What a page links to, what it loads, and the anchors that it has."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        self.loads += [value for name, value in attrs if name == "src" or (name == "href" and tag == "link")]


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_there(site):
    expected = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix().replace("README", "index")
        for path in (ROOT / "docs").rglob("*.md")
    }
    expected |= {"index.html", "BUILD.html", "findings/index.html", "experiments/minimal.py.html"}
    assert expected <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert "Two commands" in (site / "index.html").read_text()


def test_links_and_anchors_lead_somewhere(site, pages):
    wrong = []
    for path, page in pages.items():
        for link in (*page.links, *page.loads):
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = urllib.parse.unquote(address.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                wrong.append((path.relative_to(site).as_posix(), link))
    assert not wrong


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert not [load for load in page.loads if re.match(r"(\w+:)?//", load)], path
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", styles)


def test_lists_are_lists(pages):
    """GitHub takes a list that follows a paragraph without an empty line; Markdown's Python library does not."""
    for path in pages:
        text = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"^(?:<p>)?(?:[-*]|\d+\.) .{1,60}", text, flags=re.MULTILINE), path


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path):
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    with (tmp_path / "docs" / "data.md").open("a") as page:
        page.write("\n[no heading](metrics.md#nowhere), [no heading](../BUILD.md#nowhere-2), [no file](nowhere.md)\n")
    (tmp_path / "docs" / "unlisted.md").write_text("# A page that the navigation lacks\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    for part in ("metrics.md#nowhere", "BUILD.md#nowhere-2", "'nowhere.md'", "unlisted.md"):
        assert part in done.stderr, part
