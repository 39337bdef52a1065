"""Parts written as text: ``Entropy``, ``Energy(temperature=2)``, ``Joint(weights=IndexWeighted())``."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from offramp.core.errors import InvalidInput


def parse_part(text: str, known: Mapping[str, type], what: str) -> Any:
    """Make a part from text. Names are looked up in ``known`` without regard to case; arguments are literals or parts.

    Args:
        text: a name, or a call as in Python. Nothing is evaluated.
        known: the types that may be made, by name.
        what: for messages: ``rule``, ``recipe``.

    Raises:
        InvalidInput: the text is malformed, names an unknown part, or its arguments do not fit.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InvalidInput(f"The {what} {text!r} cannot be read. Write a name, or a call such as Energy(temperature=2).") from error
    return _make(tree, {name.lower(): kind for name, kind in known.items()}, what, text, top=True)


def _make(node: ast.expr, known: Mapping[str, type], what: str, text: str, top: bool = False) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = _lookup(node.func.id, known, what)
        if any(k.arg is None for k in node.keywords):
            raise InvalidInput(f"The {what} {text!r} cannot use **.")
        args = [_make(a, known, what, text) for a in node.args]
        named = {str(k.arg): _make(k.value, known, what, text) for k in node.keywords}
        try:
            return kind(*args, **named)
        except TypeError as error:
            takes = ", ".join(inspect.signature(kind).parameters)
            raise InvalidInput(f"{kind.__name__}({takes}) was written {text!r}: {error}.") from error
    if isinstance(node, ast.Name):
        kind = _lookup(node.id, known, what)
        try:
            return kind()
        except TypeError as error:
            raise InvalidInput(f"{kind.__name__} needs arguments: {error}. Write {kind.__name__}(...).") from error
    if isinstance(node, ast.Tuple | ast.List) and not top:
        return tuple(_make(n, known, what, text) for n in node.elts)
    if not top:
        try:
            return ast.literal_eval(node)
        except ValueError:
            pass
    raise InvalidInput(f"The {what} {text!r} cannot be read: write a name, or a call whose arguments are numbers, texts, lists or parts.")


def _lookup(name: str, known: Mapping[str, type], what: str) -> type:
    if name.lower() in known:
        return known[name.lower()]
    names = sorted(kind.__name__ for kind in known.values())
    near = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    raise InvalidInput(f"There is no {what} {name!r}. " + (f"Nearest: {', '.join(near)}." if near else f"Known: {', '.join(names)}."))
