"""A process among others: its console, the signals that it gets, and the folders that it alone may write."""

import os


def rank() -> str:
    """The number of this process in its launch, which launchers set; "0" for the first one, or without a launcher."""
    return os.environ.get("RANK") or "0"
