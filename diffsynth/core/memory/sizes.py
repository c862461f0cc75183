"""Parse and format amounts of memory such as `24GiB`."""

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {f"{letter}iB": 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int | float, name: str) -> int:
    """The number of bytes of an amount such as `24GiB`, `500 MB` or `1000`.

    Args:
        name: The setting that holds the amount, for the error message.

    Raises:
        ValueError: The text is not an amount, or its unit is unknown.
    """
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    found = AMOUNT.fullmatch(str(text))
    if found is None or found[2].lower() not in units:
        raise ValueError(f"{name} is {text!r}; expected an amount of memory such as 24GiB, 500MB or a number of bytes.")
    return round(float(found[1]) * units[found[2].lower()])


def shown_size(size: float) -> str:
    """A number of bytes as text: in GiB, or in MiB below one GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
