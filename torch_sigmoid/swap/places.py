"""Where functions are found in this process, and others in their place for a while."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from torch import Tensor

from ..internals import forget_tables, tables_built

_Function = Callable[..., Any]
_Namespace = dict[Any, Any]

_PACKAGE = __name__.partition(".")[0]
# A module's own dictionary: some define another `__dict__`, which imports what is asked for.
_namespace_of: Callable[[ModuleType], _Namespace] = vars(ModuleType)["__dict__"].__get__


class Places:
    """Every module attribute, and every value of a module's dictionaries, that is one of some functions.

    Between `occupy` and `vacate` each holds the function's substitute. Both may be called from several threads: the first
    `occupy` puts the substitutes in, the last `vacate` takes them out. A place where somebody has put something else since is
    left alone.

    Args:
        substitutes: by function. Methods of torch.Tensor are among them as `Tensor.name`.
        hidden: dictionaries to search besides, whose modules are not.
        later: by the name of a module, what gives a function in it and its substitute; asked once, when the module is there.
            The module is not imported for it.
    """

    def __init__(
        self,
        substitutes: Mapping[_Function, _Function],
        hidden: Iterable[_Namespace],
        later: Mapping[str, Callable[[ModuleType], tuple[_Function, _Function] | None]],
    ) -> None:
        self._lock = threading.RLock()
        self._users = 0
        self._substitutes: dict[_Function, _Function] = {}
        # Of each function and each substitute: the function.
        self._functions: dict[int, _Function] = {}
        self._places: dict[tuple[int, Any], tuple[_Namespace, _Function]] = {}
        self._methods: dict[str, _Function] = {}
        self._seen: dict[str, weakref.ref[ModuleType]] = {}
        self._newest: tuple[int, str | None] = 0, None
        self._later = dict(later)
        self._imports = _Imports(later, self._look_and_fill)
        self._tables: list[Any] = []
        for function, substitute in substitutes.items():
            self._substitute(function, substitute)
        for namespace in hidden:
            self._search(namespace)

    def occupy(self) -> None:
        with self._lock:
            if not self._users:
                self._tables = tables_built()
                sys.meta_path.insert(0, self._imports)
            self._users += 1
            self._look_and_fill()

    def vacate(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
            sys.meta_path.remove(self._imports)
            # What was imported meanwhile holds substitutes.
            self._look()
            for (_, key), (namespace, function) in self._places.items():
                if namespace.get(key) is self._substitutes[function]:
                    namespace[key] = function
            for name, method in self._methods.items():
                if vars(Tensor).get(name) is self._substitutes[method]:
                    delattr(Tensor, name)
            forget_tables(but=self._tables)

    def _look_and_fill(self, imported: str | None = None) -> None:
        with self._lock:
            self._look(imported)
            for (_, key), (namespace, function) in self._places.items():
                if namespace.get(key) is function:
                    namespace[key] = self._substitutes[function]
            for name, method in self._methods.items():
                if getattr(Tensor, name) is method:
                    setattr(Tensor, name, self._substitutes[method])

    def _substitute(self, function: _Function, substitute: _Function) -> None:
        self._substitutes[function] = substitute
        self._functions |= {id(function): function, id(substitute): function}
        name = function.__name__
        if getattr(Tensor, name, None) is function and name not in vars(Tensor):
            self._methods[name] = function

    def _look(self, imported: str | None = None) -> None:
        """Search the modules that are new or still being imported, and `__main__`, which grows; `imported` is complete."""
        modules = sys.modules
        for name in [name for name in self._later if name in modules]:
            module = modules[name]
            if name == imported or not _is_being_imported(module):
                find = self._later.pop(name)
                if found := find(module):
                    self._substitute(*found)
                    self._newest, self._seen = (0, None), {}
        newest = len(modules), next(reversed(modules), None)
        if newest != self._newest:
            self._newest = newest
            for name, module in list(modules.items()):
                seen = self._seen.get(name)
                if not isinstance(module, ModuleType) or (seen is not None and seen() is module):
                    continue
                if _is_being_imported(module):
                    self._newest = 0, None
                else:
                    self._seen[name] = weakref.ref(module)
                for namespace in _namespaces(name, module):
                    if namespace is _namespace_of(module) or not _is_of_torch(name):
                        self._search(namespace)
                    else:
                        self._clear(namespace)
        if isinstance(main := modules.get("__main__"), ModuleType):
            self._search(_namespace_of(main))

    def _search(self, namespace: _Namespace) -> None:
        # Copies: another thread may import.
        if self._functions.keys().isdisjoint(map(id, list(namespace.values()))):
            return
        for key, value in list(namespace.items()):
            if id(value) in self._functions:
                self._places[id(namespace), key] = namespace, self._functions[id(value)]

    def _clear(self, registry: _Namespace) -> None:
        """Give a registry of torch's, which was built while substitutes were in place, the functions themselves."""
        for key, value in list(registry.items()):
            function = self._functions.get(id(value), value)
            if function is not value:
                registry[key] = function


def _is_of_torch(name: str) -> bool:
    return name.partition(".")[0] == "torch"


def _is_being_imported(module: ModuleType) -> bool:
    return getattr(_namespace_of(module).get("__spec__"), "_initializing", False)


def _namespaces(name: str, module: ModuleType) -> Iterator[_Namespace]:
    """A module's dictionary and those among its values; nothing of this package and of torch's C++."""
    if name.partition(".")[0] == _PACKAGE or name.startswith("torch._C"):
        return
    namespace = _namespace_of(module)
    yield namespace
    yield from (value for value in list(namespace.values()) if type(value) is dict)


class _Imports(MetaPathFinder):
    """Calls `after` with the name of each of the modules `names` that has been imported."""

    def __init__(self, names: Iterable[str], after: Callable[[str], None]) -> None:
        self._names = frozenset(names)
        self._after = after

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in self._names else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._after(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
