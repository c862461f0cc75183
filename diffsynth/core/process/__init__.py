"""A process among others: its console, the signals that it gets, and the folders that it alone may write."""
