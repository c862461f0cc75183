"""Amounts of memory as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.core.memory.sizes import UNITS, parse_size


@given(st.integers(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]), st.booleans())
def test_a_number_and_a_unit_are_so_many_bytes(number, unit, space, is_lower):
    unit_as_written = unit.lower() if is_lower else unit
    assert parse_size(f"{number}{space}{unit_as_written}", "memory.budget") == number * UNITS[unit]


def test_fractions_and_plain_numbers_are_amounts_too():
    assert parse_size("1.5GiB", "memory.budget") == 3 * 2**29
    assert parse_size(24, "memory.budget") == 24


@pytest.mark.parametrize("text", ["", "24 GiBs", "GiB", "-1GiB", "24 G", "1e3", "nan"])
def test_anything_else_is_refused_by_name(text):
    with pytest.raises(ValueError, match="memory.budget is .*; expected an amount of memory such as 24GiB"):
        parse_size(text, "memory.budget")
