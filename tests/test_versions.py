"""docs/versions.md tells the bounds that pyproject.toml sets."""

import re

import tiny


def test_the_page_tells_every_bound():
    _, project = (tiny.ROOT / "pyproject.toml").read_text().split("[project]")
    bounds = set(re.findall(r'"([\w-]+)>=([\d.]+)', project))
    page = (tiny.ROOT / "docs" / "versions.md").read_text()
    assert set(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, re.MULTILINE)) == bounds
