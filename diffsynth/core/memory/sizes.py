"""Amounts of memory as people write them."""

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}
WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int | float, name: str) -> int:
    """Bytes of an amount such as `24GiB`, `500 MB` or a number of bytes.

    Args:
        name: What the amount is of, for the message.

    Raises:
        ValueError: It is no amount, or its unit is unknown.
    """
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    found = WRITTEN.fullmatch(str(text))
    if found is None or found[2].lower() not in units:
        raise ValueError(f"{name} is {text!r}; expected an amount of memory such as 24GiB, 500MB or a number of bytes.")
    return round(float(found[1]) * units[found[2].lower()])


def shown_size(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
