"""Operators, which turn a cell of a table into training data, and augmentation."""
