"""What a user may write as the budget of a rootstock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftkit.errors import BudgetError
from graftkit.vision.budget import Budget


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("0.6MB", "bytes", 600_000),
        ("500KiB", "bytes", 512_000),
        (" 12 b ", "bytes", 12),
        ("1gib", "bytes", 2**30),
        ("2ms", "ms", 2),
        ("0.5 MS", "ms", 0.5),
        ("20MMAC", "macs", 20_000_000),
        ("1.5GMAC", "macs", 1_500_000_000),
        ("7mac", "macs", 7),
    ],
)
def test_bytes_milliseconds_and_multiply_accumulates_are_understood(
    text: str, kind: str, amount: float
) -> None:
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount, budget.text) == (kind, amount, text.strip())


@pytest.mark.parametrize(
    "text", ["", "MB", "0.6", "5%", "1bpp", "-1MB", "1e3MB", "2s", "20MACs", ".5MB", "nanMB", "٣MB"]
)
def test_anything_else_is_refused_with_what_would_be_understood(text: str) -> None:
    with pytest.raises(BudgetError, match=r"0\.6MB.*2ms.*20MMAC"):
        Budget.parse(text)


@pytest.mark.parametrize(("text", "fault"), [("0.0MB", "zero"), ("9" * 400 + "ms", "infinite")])
def test_an_amount_that_bounds_nothing_is_refused(text: str, fault: str) -> None:
    with pytest.raises(BudgetError, match=fault):
        Budget.parse(text)


@given(st.text(max_size=12))
def test_any_text_is_a_positive_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert budget.amount > 0
