"""The structure of the sources: packages, their imports, threads, and the names that modules define."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER, CLIENT = ROOT / "server" / "maskwire_server", ROOT / "client" / "maskwire"


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources(folder: Path) -> list[Path]:
    """The hand-written modules below a folder."""
    return [path for path in sorted(folder.rglob("*.py")) if "_pb2" not in path.name]


@dataclass(frozen=True)
class Packages:
    """The parts of one distribution, and which imports which."""

    parts: tuple[str, ...]
    """Its packages, and the modules beside them."""
    packages: frozenset[str]
    arrows: frozenset[tuple[str, str]]

    @classmethod
    def read(cls, folder: Path) -> Packages:
        """Read them from the sources of a distribution."""
        arrows, parts, packages = set(), set(), set()
        for path in sources(folder):
            below = path.relative_to(folder)
            part = below.parts[0].removesuffix(".py")
            if part.startswith("_"):
                continue
            parts.add(part)
            if len(below.parts) > 1:
                packages.add(part)
            for name in imports(path):
                first, _, rest = name.partition(".")
                if first == folder.name and rest:
                    arrows.add((part, rest.partition(".")[0]))
        known = {(one, other) for one, other in arrows if one != other and other in parts}
        return cls(tuple(sorted(parts)), frozenset(packages), frozenset(known))

    def shared(self, users: Iterable[str]) -> tuple[str, ...]:
        """The parts that import no package but one of these, and that one of `users` imports."""
        shared = {part for part in self.parts if part not in self.packages or part == "config"}
        while True:
            closed = {
                part for part in shared if all(other in shared for one, other in self.arrows if one == part)
            }
            if closed == shared:
                return tuple(part for part in self.parts if part in shared and self._is_used(part, users))
            shared = closed

    def _is_used(self, part: str, users: Iterable[str]) -> bool:
        return any((user, part) in self.arrows for user in users)


def threads() -> list[tuple[str, str]]:
    """The names of the server's threads, and the modules that start them."""
    found = []
    for path in sources(SERVER):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] not in (
                "Thread",
                "ThreadPoolExecutor",
            ):
                continue
            for keyword in node.keywords:
                if keyword.arg in ("name", "thread_name_prefix") and isinstance(keyword.value, ast.Constant):
                    found.append((str(keyword.value.value), str(path.relative_to(SERVER))))
    return sorted(found)


def names(path: Path) -> set[str]:
    """The functions, classes and methods that a module defines: `function`, `Class`, `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def missing(text: str) -> list[str]:
    """What a page names and the sources lack.

    A page names a module as `engine/admission.py`, what it defines in brackets after it, and methods as `Class.method`.
    """
    wrong = []
    for file, said in re.findall(r"`((?:\w+/)*\w+\.py)`(?:\s\(([^)]*)\))?", text):
        path = next((root / file for root in (SERVER, CLIENT, ROOT) if (root / file).exists()), None)
        if path is None:
            wrong.append(file)
        else:
            wrong += [
                f"{file}: {name}" for name in re.findall(r"`([\w.]+)`", said) if name not in names(path)
            ]
    defined = {name for root in (SERVER, CLIENT) for path in sources(root) for name in names(path)}
    return wrong + [name for name in re.findall(r"`([A-Z]\w+\.\w+)`", text) if name not in defined]
