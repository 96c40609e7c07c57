"""The pages of the site are the repository's own Markdown, under its own paths: a link works there as it does here.

What a page links to goes with it: figures, tables, and source files as text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "kernels/README.md", "benchmarks/README.md", "benchmarks/results/*.md", "docs/**/*.md")
LINK = re.compile(r"\]\(([^)\s#:]+)[^)\s:]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in files.documentation_pages():
        files.remove(file)
    pages = sorted({path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)})
    targets = {
        posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        for page in pages
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    }
    for path in (*pages, *sorted(targets.difference(pages))):
        if (ROOT / path).is_file():
            file = File.generated(config, path, abs_src_path=str(ROOT / path))
            if path.endswith(".py"):  # which a browser would not show
                file.dest_uri += ".txt"
            files.append(file)
    return files
