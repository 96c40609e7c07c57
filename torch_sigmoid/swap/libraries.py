"""The installed libraries whose forms are known: their versions, and which of those forms stand in their source.

Nothing of a library is imported.
"""

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import criteria, focal
from .forms import BY_HAND, activations, forms
from .trees import fingerprint, tree_of


class Library(NamedTuple):
    """An installed library; `versions` says in which its forms were seen. `version` is None where its metadata is missing."""

    name: str
    version: str | None
    versions: str

    @property
    def is_known(self) -> bool:
        """Whether it is of a version in which its forms were seen."""
        return self.version is not None and f"{self.version}.".startswith(f"{self.versions}.")


class Found(NamedTuple):
    """A form, and how many of its known methods a library has."""

    name: str
    known: int
    found: int


def installed() -> list[Library]:
    """The installed libraries, in the order of the forms' files."""
    versions = {form.library: form.versions for form in forms() if form.library != BY_HAND}
    found = {name: importlib.util.find_spec(name) for name in versions}
    # A folder of that name, without code of its own, has no origin.
    return [Library(name, _version(name), versions[name]) for name, spec in found.items() if spec and spec.origin]


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # the distribution has another name, as that of open_clip
        distributions = importlib.metadata.packages_distributions().get(library, ())
        return importlib.metadata.version(distributions[0]) if distributions else None


def found_in_source(library: str) -> list[Found]:
    """How many of the known functions of each form stand in an installed library's source. Takes seconds for a large one."""
    known: dict[str, frozenset[str]] = {}
    names = {"forward"}
    for form in forms():
        if form.library == library:
            known[form.name] = known.get(form.name, frozenset()).union(form.fingerprints, *form.fingerprints_besides.values())
            names.update(form.methods)
    for activation in activations():
        if activation.library == library:
            known[activation.name] = activation.fingerprints
    if library == "transformers":
        known["criterion with a focal loss"] = frozenset(criteria.KNOWN)
        names.add(criteria.METHOD)
    in_source = set(_fingerprints_in(library, {*names, focal.NAME}))
    found = [Found(name, len(fingerprints), len(fingerprints & in_source)) for name, fingerprints in known.items()]
    focal_losses = sum(module.startswith(f"{library}.") for module in focal.LIBRARIES)
    return found + [Found("focal loss", focal_losses, len(in_source & focal.FORMS.keys()))] * bool(focal_losses)


def _fingerprints_in(library: str, names: set[str]) -> Iterator[str]:
    """The fingerprints of functions whose names end in one of these, `_default_apply_gate` for "_apply_gate"."""
    # A function is cut out by its indentation, so that not whole files are parsed, and copies only once.
    function = re.compile(rf"^([ \t]*)def \w*(?:{'|'.join(names)})\(.*\n(?:(?:\1[ \t)].*)?\n)*", re.MULTILINE)
    spec = importlib.util.find_spec(library)
    folders = (spec and spec.submodule_search_locations) or ()
    files = (path for folder in folders for path in Path(folder).rglob("*.py"))
    texts = {match[0] for path in files for match in function.finditer(path.read_text("utf-8", errors="replace") + "\n")}
    return (fingerprint(definition) for definition in map(tree_of, texts) if definition is not None)
