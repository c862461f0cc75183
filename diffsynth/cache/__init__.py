"""Stage one of two: what frozen units make of a data set, on disk under keys that name its content."""
