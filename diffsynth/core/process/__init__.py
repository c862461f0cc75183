"""What a process shares with others: its console, its signals, and folders that one at a time may write."""

import os


def rank() -> str:
    """The number of this process in its launch, which launchers set; "0" for the first one, or without a launcher."""
    return os.environ.get("RANK") or "0"
