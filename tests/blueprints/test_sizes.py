"""The expression language: against a value computed while the expression is built, and against hostile text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.blueprints.sizes import MAX_SIZE, MAX_TEXT, check_size, evaluate, names_in, normal_form
from esper.contracts.errors import BlueprintError

VALUES = {"d_in": 48, "d_out": 30, "rank": 4}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, str, int | None]:
    """(text, the same with operands of commutative operators swapped, value or None where there is none)."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from([*VALUES, "1", "2", "7"]))
        return name, name, VALUES.get(name) or int(name)
    operator = draw(st.sampled_from(["+", "-", "*", "//", "/", "min", "max"]))
    (a, a_swapped, va), (b, b_swapped, vb) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    space = draw(st.sampled_from(["", " "]))
    if operator in ("min", "max"):
        text, swapped = f"{operator}({a},{space}{b})", f"{operator}({b_swapped},{a_swapped})"
    elif operator in ("+", "*"):
        text, swapped = f"({a}{space}{operator}{space}{b})", f"({b_swapped}{operator}{a_swapped})"
    else:
        text, swapped = f"({a}{space}{operator}{b})", f"({a_swapped} {operator} {b_swapped})"
    if va is None or vb is None or (operator in ("/", "//") and (vb == 0 or (operator == "/" and va % vb))):
        return text, swapped, None
    results = {"+": va + vb, "-": va - vb, "*": va * vb, "min": min(va, vb), "max": max(va, vb)}
    return text, swapped, results[operator] if operator in results else va // vb


@given(expressions())
def test_value_and_normal_form(drawn: tuple[str, str, int | None]) -> None:
    text, swapped, value = drawn
    if len(text) > MAX_TEXT or len(swapped) > MAX_TEXT:
        return
    assert normal_form(text) == normal_form(swapped)
    if value is None or not 1 <= value <= MAX_SIZE:
        with pytest.raises(BlueprintError):
            evaluate(text, VALUES)
    else:
        assert evaluate(text, VALUES) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4*rank", 16),
        ("d_in // rank * 2", 24),
        ("d_in - rank - 4", 40),
        ("2 + 3 * rank", 14),
        ("min(d_in, d_out)", 30),
        (" ( rank ) ", 4),
        (8, 8),
        ("d_in*d_in*d_in*d_in/d_in/d_in/d_in", 48),
    ],
)
def test_precedence(text: str | int, value: int) -> None:
    assert evaluate(check_size(text), VALUES) == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected a number"),
        ("rank rank", "unexpected 'rank'"),
        ("rank *", "the end"),
        ("(rank", r"expected '\)'"),
        ("min(rank)", "expected ','"),
        ("rank ** 2", "expected a number"),
        ("__import__('os')", "cannot read"),
        ("rank.real", "cannot read"),
        ("1e3", "cannot read"),
        ("123456789", "cannot read"),
        ("-rank", "expected a number"),
        ("٣", "cannot read"),
        ("(" * 65, "characters"),
        (True, "not True"),
        (2.0, "not 2.0"),
        (None, "not None"),
        (0, r"in \[1, 1048576\], not 0"),
        (MAX_SIZE + 1, "not 1048577"),
        pytest.param(10**5000, "too large to show", id="huge"),
    ],
)
def test_malformed(text: object, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        check_size(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rank - 4", "is 0"),
        ("rank - 5", "is -1"),
        ("d_in / 7", "not whole"),
        ("d_in // (rank - 4)", "divides by zero"),
        ("ranks", "names 'ranks'; known: d_in, d_out, rank"),
        ("d_in * 99999", "must be in"),
        ("9999999*9999999*0", "passes through"),
    ],
)
def test_out_of_range(text: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        evaluate(text, VALUES)


@given(st.text(alphabet="d_inrak0123456789+-*/(), \x00é", max_size=80))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        check_size(text)
    except BlueprintError:
        return
    assert all(name.isidentifier() for name in names_in(text))
    assert normal_form(text) == normal_form(f" {text} ") if len(text) + 2 <= MAX_TEXT else True


def test_normal_form_keeps_meaning_apart() -> None:
    different = [
        "rank",
        "2*rank",
        "rank*rank",
        "d_in - rank",
        "rank - d_in",
        "d_in / rank",
        "d_in // rank",
        "min(d_in, rank)",
    ]
    assert len({normal_form(text) for text in different}) == len(different)
    assert normal_form(8) == normal_form("8") == normal_form("(8)")
    assert normal_form("2*(rank*3)") == normal_form("(3*2)*rank")
