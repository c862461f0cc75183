"""The check of a size against a network's table of positions."""

from collections.abc import Mapping
from typing import Any


def check_positions(request: Mapping[str, Any], network: str, end: float) -> None:
    """Refuse a complete request whose `height` or `width` is above `end`, where a network's positions end, in pixels.

    Args:
        network: The network's name, for errors.

    Raises:
        ValueError: A side is longer.
    """
    height, width = request["height"], request["width"]
    if max(height, width) > end:
        raise ValueError(
            f"height x width is {height} x {width}, but the positions of {network} end at {end} pixels; set smaller "
            "ones."
        )
