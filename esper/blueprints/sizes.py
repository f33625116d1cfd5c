"""Symbolic sizes: ``8``, ``"d_in"``, ``"4*rank"``, ``"max(1, d_in // 16)"``.

The language has integers, names, ``+ - * / //``, ``min``, ``max`` and parentheses, and nothing else. ``/`` must divide
exactly, ``//`` rounds down. Text is parsed by hand, never evaluated by Python, and every value on the way is bounded,
so that a hostile blueprint can cost neither time nor memory.

    sum     = product { ("+" | "-") product }
    product = atom { ("*" | "/" | "//") atom }
    atom    = INTEGER | NAME | ("min" | "max") "(" sum "," sum ")" | "(" sum ")"
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

from esper.contracts.errors import BlueprintError

__all__ = ["MAX_SIZE", "Size", "check_size", "evaluate", "names_in", "normal_form", "shown"]

#: An integer, or an expression over ``d_in``, ``d_out`` and the blueprint's parameters.
Size = int | str

#: The largest size a node, a tap or a parameter may have.
MAX_SIZE = 1 << 20
#: The longest expression. It bounds the depth of the recursion below, too.
MAX_TEXT = 64
#: Intermediate values may exceed a size (``d_in*d_in/4``), but not without end.
_MAX_VALUE = 1 << 40

_TOKEN = re.compile(
    r"\s*(?:(?P<int>[0-9]{1,8})(?![0-9A-Za-z_])|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<op>//|[-+*/(),]))", re.ASCII
)
_FUNCTIONS = ("max", "min")

# An expression is ("int", value), ("name", name) or (operator, operand, operand, ...).
_Tree = tuple[object, ...]


def check_size(value: object, what: str = "size") -> Size:
    """Return ``value`` if it is a size, else raise.

    Args:
        value: Anything; an int in [1, 2**20] or a well-formed expression passes.
        what: What the value is, for the message.

    Raises:
        BlueprintError: saying what is wrong with the value.
    """
    if isinstance(value, str):
        _parse(value)
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise BlueprintError(f"{what} must be an integer or an expression, not {shown(value)}")
    if not 1 <= value <= MAX_SIZE:
        raise BlueprintError(f"{what} must be in [1, {MAX_SIZE}], not {shown(value)}")
    return value


def names_in(size: Size) -> frozenset[str]:
    """The names that ``size`` mentions."""
    return frozenset() if isinstance(size, int) else _names(_parse(size))


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """The value of ``size``.

    Args:
        size: A size that :func:`check_size` accepts.
        values: What each name stands for.

    Returns:
        An integer in [1, 2**20].

    Raises:
        BlueprintError: for an unknown name, a division that is not exact, or a value out of range.
    """
    value = size if isinstance(size, int) else _value(_parse(size), values, size)
    if not 1 <= value <= MAX_SIZE:
        given = "" if isinstance(size, int) else f" (with {_bindings(size, values)})"
        raise BlueprintError(f"size {size!r} is {value}{given}; it must be in [1, {MAX_SIZE}]")
    return value


def normal_form(size: Size) -> str:
    """One spelling for all sizes that differ only in spaces, in needless parentheses or in the order of operands."""
    return _spell(_parse(str(size)))


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> _Tree:
    if len(text) > MAX_TEXT:
        raise BlueprintError(f"size expression has {len(text)} characters, more than {MAX_TEXT}: {text[:32]!r}...")
    tokens = _tokens(text)
    tree, rest = _sum(tokens, 0, text)
    if rest != len(tokens):
        raise BlueprintError(f"size expression {text!r}: unexpected {tokens[rest]!r}")
    return tree


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise BlueprintError(f"size expression {text!r}: cannot read {text[position:].strip()!r}")
        tokens.append(match.group(match.lastgroup or 0))
        position = match.end()
    return tokens


def _sum(tokens: list[str], at: int, text: str) -> tuple[_Tree, int]:
    tree, at = _product(tokens, at, text)
    while at < len(tokens) and tokens[at] in ("+", "-"):
        right, after = _product(tokens, at + 1, text)
        tree, at = (tokens[at], tree, right), after
    return tree, at


def _product(tokens: list[str], at: int, text: str) -> tuple[_Tree, int]:
    tree, at = _atom(tokens, at, text)
    while at < len(tokens) and tokens[at] in ("*", "/", "//"):
        right, after = _atom(tokens, at + 1, text)
        tree, at = (tokens[at], tree, right), after
    return tree, at


def _atom(tokens: list[str], at: int, text: str) -> tuple[_Tree, int]:
    token = tokens[at] if at < len(tokens) else ""
    if token.isdigit():
        return ("int", int(token)), at + 1
    if token == "(":
        tree, at = _sum(tokens, at + 1, text)
        return tree, _expect(tokens, at, ")", text)
    if token in _FUNCTIONS:
        left, at = _sum(tokens, _expect(tokens, at + 1, "(", text), text)
        right, at = _sum(tokens, _expect(tokens, at, ",", text), text)
        return (token, left, right), _expect(tokens, at, ")", text)
    if token.isidentifier():
        return ("name", token), at + 1
    raise BlueprintError(f"size expression {text!r}: expected a number, a name or '(', found {token or 'the end'!r}")


def _expect(tokens: list[str], at: int, token: str, text: str) -> int:
    if at >= len(tokens) or tokens[at] != token:
        found = tokens[at] if at < len(tokens) else "the end"
        raise BlueprintError(f"size expression {text!r}: expected {token!r}, found {found!r}")
    return at + 1


def _names(tree: _Tree) -> frozenset[str]:
    if tree[0] == "name":
        return frozenset([str(tree[1])])
    return frozenset().union(*(_names(part) for part in tree[1:] if isinstance(part, tuple)))


def _value(tree: _Tree, values: Mapping[str, int], text: str) -> int:
    kind, *parts = tree
    if kind == "int" and isinstance(parts[0], int):
        return parts[0]
    if kind == "name":
        name = str(parts[0])
        if name not in values:
            raise BlueprintError(f"size {text!r} names {name!r}; known: {', '.join(sorted(values))}")
        return values[name]
    left, right = (_value(part, values, text) for part in parts if isinstance(part, tuple))
    result = _apply(str(kind), left, right, text, values)
    if abs(result) > _MAX_VALUE:
        raise BlueprintError(
            f"size {text!r} passes through {result}, beyond {_MAX_VALUE} (with {_bindings(text, values)})"
        )
    return result


def _apply(operator: str, left: int, right: int, text: str, values: Mapping[str, int]) -> int:
    if operator in ("/", "//"):
        if right == 0:
            raise BlueprintError(f"size {text!r} divides by zero (with {_bindings(text, values)})")
        if operator == "/" and left % right:
            raise BlueprintError(
                f"size {text!r}: {left} / {right} is not whole (with {_bindings(text, values)}); write // to round down"
            )
        return left // right
    if operator == "min":
        return min(left, right)
    if operator == "max":
        return max(left, right)
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def _spell(tree: _Tree) -> str:
    operator, *parts = tree
    if operator in ("int", "name"):
        return str(parts[0])
    spelled = [_spell(part) for part in _operands(tree)]
    if operator in ("+", "*", "min", "max"):
        spelled.sort()
    return f"({operator} {' '.join(spelled)})"


def _operands(tree: _Tree) -> list[_Tree]:
    """The operands of a node, with those of nested nodes of the same associative operator pulled up."""
    found: list[_Tree] = []
    for part in tree[1:]:
        if isinstance(part, tuple):
            associative = tree[0] in ("+", "*", "min", "max") and part[0] == tree[0]
            found.extend(_operands(part) if associative else [part])
    return found


def _bindings(size: str, values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={values[name]}" for name in sorted(names_in(size)) if name in values) or "no names"


def shown(value: object) -> str:
    """A short text for any value, the huge integers and deep lists included whose ``repr`` would raise."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 64 else f"{text[:60]}..."
