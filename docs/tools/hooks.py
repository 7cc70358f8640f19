"""Lets the pages link to files outside `docs/`, as they do on the repository's own page.

`[changelog](../CHANGELOG.md)` works where the repository is shown. In the site, README, changelog
and the like become pages of their own, scripts become pages that show their code, notebooks are
copied, and links are changed to lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
TEXTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")
SCRIPTS = "examples/*.py"
NOTEBOOKS = "examples/**/*.ipynb"


def published() -> dict[str, str]:
    """The pages of files outside `docs/`: path in the repository, path in the site."""
    texts = {name: f"project/{Path(name).stem.lower()}.md" for name in TEXTS}
    scripts = (path.relative_to(ROOT) for path in sorted(ROOT.glob(SCRIPTS)))
    notebooks = (path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(NOTEBOOKS)))
    return {
        **texts,
        **{path.as_posix(): path.with_suffix(".md").as_posix() for path in scripts},
        **{path: path for path in notebooks},
    }


def as_page(source: str) -> str:
    """The Markdown of a file outside `docs/`; notebooks stay as they are."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith((".md", ".ipynb")):
        return text
    kind = "python" if source.endswith(".py") else "text"
    return f"# {source}\n\n````{kind}\n{text.rstrip()}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file outside `docs/` that pages may link to."""
    for source, target in published().items():
        file = File.generated(config, target, content=as_page(source))
        if source.endswith(".py"):
            file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Changes links between the repository's files to links between the site's pages."""
    pages = published()
    sources = {target: source for source, target in pages.items()}
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation"]  # the tabs above have all of it
    source = sources.get(here, f"docs/{here}")

    def changed(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        in_site = pages.get(target, target.removeprefix("docs/"))
        if re.match(r"[a-z]+:", link[2]) or (in_site == target and target not in pages):
            return link[0]
        return link[1] + posixpath.relpath(in_site, posixpath.dirname(here) or ".") + link[3]

    return LINK.sub(changed, markdown)
