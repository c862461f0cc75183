"""One run: its loop, its state, its engines, what it evaluates and what it records."""
