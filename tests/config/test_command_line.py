"""What the command line does before torch starts."""

import os

import pytest
import tiny

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("given, expected", [(None, "expandable_segments:True"), ("max_split_size_mb:64", None)])
def test_the_allocators_segments_may_grow_unless_it_is_told_otherwise(given, expected, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(NAMES[1], given)
    with pytest.raises(SystemExit):
        tiny.command_line(monkeypatch, "train.py", "--no-such-option")
    assert [os.environ.get(name) for name in NAMES] == [expected, given or expected]
