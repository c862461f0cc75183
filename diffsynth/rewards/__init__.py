"""What a scorer needs in a process, and an environment, of its own: no torch."""
