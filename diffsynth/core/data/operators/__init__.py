"""From a cell of a table to what is trained on."""
