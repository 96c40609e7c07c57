"""The Python of Markdown pages, for the tests that run it, and what it prints."""

import contextlib
import io
import linecache
import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$(?:\n\1```\n(.*?)^\1```$)?", re.M | re.S)


class Block(NamedTuple):
    """A block of Python, and the block without a language that follows at once: what the first one prints."""

    code: str
    printed: str


def blocks(page):
    """The blocks of a page, such as "docs/save.md"."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [Block(re.sub(f"^{indentation}", "", code, flags=re.M), printed) for indentation, code, printed in found]


def run(code, names, file="page"):
    """Run a block with `names`, to which it adds its own; returns what it prints."""
    # `replace` reads the source of the classes that a block defines.
    linecache.cache[file] = len(code), None, code.splitlines(keepends=True), file
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, file, "exec"), names)
    return printed.getvalue()


def run_all(page):
    """Run a page's blocks, one after the other; returns what each prints."""
    names = {"__name__": "__main__"}
    return [run(block.code, names, f"{page}, block {number}") for number, block in enumerate(blocks(page), 1)]
