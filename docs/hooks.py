"""The pages of the site are the repository's own Markdown, under its own paths: a link works there as it does here.

What a page links to goes with it: figures and tables as files, Python as a page.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("*.md", "kernels/README.md", "benchmarks/README.md", "benchmarks/results/*.md", "docs/**/*.md")
LINK = re.compile(r"\]\(([^)\s#:]+)[^)\s:]*\)")
SOURCE = """\
---
search:
  exclude: true
hide: [toc]
---
# {path}

~~~~~python
{text}
~~~~~
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in files.documentation_pages():
        files.remove(file)
    pages = {path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)}
    targets = {
        posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        for page in pages
        for target in LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    }
    for path in sorted(path for path in pages | targets if (ROOT / path).is_file()):
        if path.endswith(".py"):
            text = SOURCE.format(path=path, text=(ROOT / path).read_text(encoding="utf-8"))
            files.append(File.generated(config, f"{path}.md", content=text))
        else:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    return re.sub(r"\]\(([^)\s:]+\.py)\)", r"](\1.md)", markdown)
