"""What MkDocs shows from outside docs/: the benchmarks' pages and the changelog, with links that work in both places.

Pages link to one another as they lie in the repository, so that they can be read there as well.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "benchmarks/*.md", "benchmarks/*.json", "benchmarks/*.png")
SOURCE = "https://github.com/jaxdet/jaxdet/blob/main/"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages and figures that lie outside docs/."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns each link to a file of the repository into one to its page, or to its source where it has none."""
    here = posixpath.dirname(page.file.src_uri)
    folder = here if page.file.generated_by is not None else posixpath.join("docs", here)

    def turn(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        shown = target.removeprefix("docs/")
        if files.get_file_from_path(shown):
            return posixpath.relpath(shown, here or ".")
        return SOURCE + target if (ROOT / target).exists() else match[1]

    return LINK.sub(turn, markdown)
