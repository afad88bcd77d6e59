"""Docstrings of the client, read for docs/api.md: descriptions of arguments, attributes and fields.

A paragraph of a docstring whose lines begin with `name: ` or `name, name: ` describes arguments.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import textwrap
from dataclasses import dataclass
from typing import Any

from maskwire import results
from maskwire.v1 import values

_ARGUMENT = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): ")


@dataclass(frozen=True)
class Docstring:
    """A docstring's text before and after its arguments, by paragraph, and the arguments."""

    before: list[str]
    after: list[str]
    arguments: dict[str, str]

    @property
    def text(self) -> str:
        """All of it but the arguments."""
        return "\n\n".join([*self.before, *self.after])

    @classmethod
    def of(cls, described: Any) -> Docstring:
        """Read the docstring of a function, class or property."""
        text = inspect.cleandoc(described.__doc__ or "")
        before: list[str] = []
        after: list[str] = []
        arguments: dict[str, str] = {}
        for paragraph in text.split("\n\n"):
            if _ARGUMENT.match(paragraph) and not inspect.isclass(described):
                arguments |= _arguments(paragraph)
            else:
                (after if arguments else before).append(paragraph)
        return cls([one for one in before if one], after, arguments)


def _arguments(paragraph: str) -> dict[str, str]:
    found: dict[str, str] = {}
    names: list[str] = []
    for line in paragraph.splitlines():
        begins = _ARGUMENT.match(line)
        if begins:
            names = begins[1].split(", ")
            found |= dict.fromkeys(names, line[begins.end() :])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def attribute_docs(kind: type) -> dict[str, str]:
    """The strings that follow attributes in a class's own body, by attribute."""
    found = {}
    body = _body(kind).body
    for statement, following in itertools.pairwise(body):
        target = (
            statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        )
        words = following.value if isinstance(following, ast.Expr) else None
        if isinstance(target, ast.Name) and isinstance(words, ast.Constant) and isinstance(words.value, str):
            found[target.id] = inspect.cleandoc(words.value)
    return found


def field_docs(kind: type) -> list[tuple[str, str, str]]:
    """The name, type and description of each field of a dataclass or TypedDict, its bases' included.

    A field that is not described has the description of a field of the same name and type in another result.
    """
    body = _body(kind)
    found: list[tuple[str, str, str]] = []
    for base in body.bases:  # a TypedDict does not tell its bases at run time
        named = getattr(sys.modules[kind.__module__], ast.unparse(base), None)
        if isinstance(named, type):
            found += field_docs(named)
    docs = attribute_docs(kind)
    for one in body.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            name, annotation = one.target.id, ast.unparse(one.annotation)
            words = docs.get(name) or _SHARED.get((name, annotation))
            if words is None:
                raise ValueError(f"{kind.__name__}.{name} has no description")
            found.append((name, annotation.replace("npt.", "").replace("np.", ""), words))
    return found


def _body(kind: type) -> ast.ClassDef:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    return body


def _shared() -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for kind in (*vars(results).values(), *vars(values).values()):
        if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
            for name, words in attribute_docs(kind).items():
                if name in kind.__annotations__:
                    found.setdefault((name, str(kind.__annotations__[name])), words)
    return found


_SHARED = _shared()
