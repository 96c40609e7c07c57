"""The documentation: docstrings say all and their examples run, guides run, links lead somewhere, a browser shows the site."""

import ast
import doctest
import functools
import http.server
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import torch
from pages import ROOT, blocks, run_all
from ranks import Ranks

import torch_sigmoid
from torch_sigmoid import diagnostics, layers, swap
from torch_sigmoid.diagnostics import advice
from torch_sigmoid.swap import forms

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (torch_sigmoid, torch_sigmoid.functional, torch_sigmoid.nn, diagnostics, layers, swap)
    for name in module.__all__
}
CONSTANTS = {"torch_sigmoid.diagnostics.SIGMOID_LIKE", "torch_sigmoid.layers.MAPPING"}
WITHOUT_EXAMPLE = dict.fromkeys(CONSTANTS, "a constant; the example of what takes it shows it")
# Others than functions and classes that a caller makes.
WITHOUT_ARGUMENTS = {
    "Path": "path makes it",
    "Report": "report makes it",
    "SigmoidFunction": "its apply takes those of sigmoid",
}


def documented():
    """Every public function and class once, and the public methods of the classes, by name."""
    for name, what in PUBLIC.items():
        if name not in CONSTANTS:
            yield what.__module__ + "." + what.__qualname__, what
    for name, method in vars(diagnostics.GradientWatch).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            yield f"torch_sigmoid.diagnostics.watch.GradientWatch.{name}", method


DOCUMENTED = dict(documented())


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in WITHOUT_EXAMPLE])
def test_a_public_name_has_an_example(name):
    assert ">>> " in (PUBLIC[name].__doc__ or "")


def section(docstring, title):
    """The names in a section of a docstring, such as "Args"."""
    body = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.cleandoc(docstring), re.M)
    return [name for line in re.findall(r"^    (\w[\w, ]*):", body[1], re.M) for name in line.split(", ")] if body else []


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name.rpartition(".")[2] not in WITHOUT_ARGUMENTS])
def test_a_docstring_describes_each_parameter_and_no_other(name):
    what = DOCUMENTED[name]
    # The layers' forward takes what their functions do, and of Hugging Face's a constructor takes nothing.
    parameters = [each for each in inspect.signature(what).parameters if each not in ("self", "args", "kwargs")]
    assert section(what.__doc__, "Args") == parameters


@pytest.mark.parametrize("name", torch_sigmoid.nn.__all__)
def test_a_layer_says_what_it_saves(name):
    assert re.search(r"\bsave[sd]\b", getattr(torch_sigmoid, name).__doc__, re.I)


def sources_with_examples():
    package = ROOT / "torch_sigmoid"
    texts = {path: path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path, text in texts.items() if "    >>> " in text)
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("name", sources_with_examples())
def test_the_examples_of_docstrings_run(name):
    if name.endswith("transformers_hook"):
        pytest.importorskip("transformers", reason="an extra")
    before = torch_sigmoid.torch_below(0)
    try:
        module = importlib.import_module(name)
        result = doctest.testmod(module, extraglobs={"torch": torch, "torch_sigmoid": torch_sigmoid})
    finally:
        torch_sigmoid.torch_below(before)
    assert result.attempted
    assert not result.failed


# Guides


@pytest.fixture
def registered_forms():
    """Forms that a guide registers are gone afterwards."""
    before = list(forms._registered)
    yield
    forms._registered[:] = before


GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
NEEDS = {"docs/watch.md": ["rich"], "docs/compile.md": ["onnxscript"]}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's ONNX exporter about torch
@pytest.mark.parametrize("guide", [guide for guide in GUIDES if guide not in ("docs/distributed.md", "docs/operators.md")])
def test_a_guide_runs_and_prints_what_it_shows(guide, registered_forms):
    for needed in NEEDS.get(guide, ()):
        pytest.importorskip(needed, reason="an extra")
    torch._dynamo.reset()
    assert run_all(guide) == [block.printed for block in blocks(guide)]


def run_strictly(page):
    warnings.simplefilter("error")
    return run_all(page)


def test_the_guide_to_several_processes_runs_in_two(tmp_path):
    ranks = Ranks(2, tmp_path)
    try:
        printed = ranks.run(run_strictly, "docs/distributed.md")
    finally:
        ranks.end()
    assert printed == 2 * [[block.printed for block in blocks("docs/distributed.md")]]


def definitions(tree):
    return {node.name: node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def without_docstring(function):
    if ast.get_docstring(function):
        del function.body[0]
    return ast.unparse(function)


def tree_of(name):
    return ast.parse((ROOT / "torch_sigmoid" / name).read_text("utf-8"))


def test_the_code_of_the_guide_to_operators_is_the_packages():
    function, layer, row = (block.code for block in blocks("docs/operators.md"))
    gates, nn, operators = map(tree_of, ("gates.py", "nn.py", "operators.py"))
    (shown,) = ast.parse(function).body
    assert without_docstring(shown) == without_docstring(definitions(gates)["quick_gelu"])
    (shown,) = ast.parse(layer).body
    methods = definitions(definitions(nn)["QuickGELU"])
    assert len(shown.body) == 3
    for method in shown.body:
        assert ast.unparse(method) == ast.unparse(methods[method.name])
    (shown,) = ast.parse(f"{{{row}}}").body
    rows = next(node.value for node in ast.walk(operators) if isinstance(node, ast.AnnAssign) and node.target.id == "OPERATORS")
    kept = {ast.unparse(key): ast.unparse(value) for key, value in zip(rows.keys, rows.values)}
    assert kept["'quick_gelu'"] == ast.unparse(shown.value.values[0])


def test_the_guide_to_reports_has_every_trouble():
    headings = set(re.findall(r'Trouble\("([^"]+)"', inspect.getsource(advice)))
    assert len(headings) >= 8
    table = re.findall(r"^\| ([A-Z][A-Z …]+) \|", (ROOT / "docs/watch.md").read_text("utf-8"), re.M)
    assert {heading.replace("WATCHED LAYERS", "…") for heading in headings} == set(table)


# Links of the Markdown files, as a repository's host shows them.

MARKDOWN = [*GUIDES, *(f"docs/reference/{path.name}" for path in (ROOT / "docs/reference").glob("*.md"))]
MARKDOWN += ["README.md", "CHANGELOG.md", "kernels/README.md", "benchmarks/README.md", "benchmarks/results/tried.md"]


@pytest.mark.parametrize("page", MARKDOWN)
def test_links_lead_somewhere(page):
    page = ROOT / page
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        there = page.parent / path if path else page
        assert there.exists(), f"{page}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page}: {link}"


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site, any warning of whose build is an error."""
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(needed, reason="the extra docs is not installed", exc_type=ImportError)
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Page(HTMLParser):
    """What a page refers to, what it loads, and the anchors that it has."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors = [], [], {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag in ("link", "script", "img"):
            self.loaded += [attributes[name] for name in ("href", "src") if attributes.get(name)]


def test_the_site_has_every_public_name_and_its_links_lead_somewhere(site):
    # 404.html has the links of a site at the root of a host.
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) >= len(MARKDOWN)
    anchors = set().union(*(page.anchors for page in pages.values()))
    constants = {"torch_sigmoid.diagnostics.layers.SIGMOID_LIKE", "torch_sigmoid.layers.MAPPING"}
    assert set(DOCUMENTED) | constants <= anchors
    for path, page in pages.items():
        for link in page.links + page.loaded:
            address, anchor = urldefrag(link)
            if urlsplit(link).scheme:
                assert link in page.links, f"{path}: {link} is loaded from elsewhere"
                continue
            there = (path.parent / unquote(address)).resolve() if address else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{path}: {link}"
            assert there not in pages or unquote(anchor) in pages[there].anchors, f"{path}: {link}"


@pytest.fixture
def address(site):
    """Of a server of the site, which a worker of the search needs."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra docs is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium; on Debian: apt-get install chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


def test_a_browser_shows_the_site(site, address, browser):
    troubles, texts, figures = [], {}, 0
    context = browser.new_context()
    context.on("console", lambda message: message.type in ("error", "warning") and troubles.append(message.text))
    context.on("weberror", lambda found: troubles.append(str(found.error)))
    context.on("requestfailed", lambda request: troubles.append(f"{request.url}: {request.failure}"))
    context.on("response", lambda response: response.status >= 400 and troubles.append(f"{response.status} {response.url}"))
    names = [path.relative_to(site).as_posix() for path in site.rglob("*.html")]
    # Pages of source files are all alike.
    names = [name for name in names if not name.endswith(".py.html") or name == "kernels/maths.py.html"]
    pages = {name: context.new_page() for name in names}
    for name, page in pages.items():
        page.goto(f"{address}/{name}", wait_until="commit")
    for name, page in pages.items():
        page.wait_for_load_state("networkidle")
        widths = page.evaluate("Array.from(document.images, image => image.naturalWidth)")
        assert all(widths), f"{name}: a figure is not shown"
        figures += len(widths)
        texts[name] = " ".join(page.inner_text("article").split())
    home = pages["index.html"]
    home.bring_to_front()
    home.get_by_role("textbox", name="Search").click()
    home.keyboard.type("focal")
    home.locator(".md-search-result__link", has_text="focal").first.wait_for()
    assert not troubles
    assert figures >= len(re.findall(r"^!\[", "".join((ROOT / each).read_text("utf-8") for each in MARKDOWN), re.M))
    # A formula reads as it is written.
    reference = " ".join(text for name, text in texts.items() if "/reference/" in name)
    for name in torch_sigmoid.functional.__all__:
        first = inspect.getdoc(getattr(torch_sigmoid, name)).split("\n\n")[0]
        assert " ".join(first.replace("`", "").split()) in reference, name
    assert "σ'(x) = σ(x)·(1 - σ(x)) = e / (1 + e)², e = e^-|x|" in texts["kernels/maths.py.html"]
    assert "σ'(x) = e⁻ˣ / (1 + e⁻ˣ)², the product of 1 / (1 + e⁻ˣ) = σ and e⁻ˣ / (1 + e⁻ˣ) = 1-σ." in texts["index.html"]
