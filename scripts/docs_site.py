"""Hooks of mkdocs.yml: README.md is the home page, and what the pages link to outside of docs/ is in the site too.

The pages are written for the repository, where README.md links to docs/data.md and docs/data.md to ../BUILD.md. Here those
links are turned into the site's. A source file becomes a page with its listing.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File, InclusionLevel

_ROOT = pathlib.Path(__file__).parent.parent
_DOCS = _ROOT / "docs"
_HOME = _ROOT / "README.md"
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")  # the file of a link; neither an address nor an anchor alone
_LANGUAGES = {".py": "python", ".sh": "bash", ".cff": "yaml", ".json": "json"}


def _linked(text: str, folder: pathlib.Path) -> set[pathlib.Path]:
    """The files of the repository that a page in this folder links to."""
    files = ((folder / target).resolve() for target in _LINK.findall(text))
    return {file for file in files if file.is_file() and _ROOT in file.parents}


def _place(file: pathlib.Path) -> str:
    """Where a file of the repository is in the site, as a source: docs/data.md is data.md, setup.py is setup.py.md."""
    if file == _HOME:
        return "index.md"
    if _DOCS in file.parents:
        return file.relative_to(_DOCS).as_posix()
    path = file.relative_to(_ROOT).as_posix()
    return path if file.suffix == ".md" else f"{path}.md"


def _page(file: pathlib.Path, config) -> File:
    """The page of a file outside of docs/."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return File.generated(config, _place(file), content=text)
    listing = f"# {file.relative_to(_ROOT)}\n\n``````{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n``````\n"
    return File.generated(config, _place(file), content=listing, inclusion=InclusionLevel.NOT_IN_NAV)


def on_files(files, config):
    """Adds the pages of what is linked, from page to page."""
    waiting = [_HOME, *_DOCS.rglob("*.md")]
    known = set(waiting)
    while waiting:
        page = waiting.pop()
        new = _linked(page.read_text(encoding="utf-8"), page.parent) - known
        known |= new
        waiting += [file for file in new if file.suffix == ".md"]
    for file in sorted(known):
        if _DOCS not in file.parents:
            files.append(_page(file, config))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns the repository's links into the site's."""
    place = page.file.src_uri
    source = _HOME if place == "index.md" else next((f for f in (_DOCS / place, _ROOT / place) if f.is_file()), None)
    if source is None:  # a listing
        return markdown

    def in_site(match):
        file = (source.parent / match[0]).resolve()
        return posixpath.relpath(_place(file), posixpath.dirname(place)) if file.is_file() else match[0]

    return _LINK.sub(in_site, markdown)
