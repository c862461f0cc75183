"""Each line of docs/errors.md is what the command answers now."""

import os

import pytest
from conftest import ROOT
from refusals import COLUMNS, HEAD, PAGE, REFUSALS
from tiny import command_line

DEFAULT = 6  # every so many rows are tried by default; `-m ""` tries all
ALL = [refusal for section in REFUSALS.values() for refusal in section]
ROWS = [pytest.param(row, id=row.shown, marks=[pytest.mark.slow] if n % DEFAULT else []) for n, row in enumerate(ALL)]


@pytest.fixture(scope="module")
def rows():
    """The lines of the page by command; `make errors` writes the page with what the tests have found."""
    found = {}
    yield found
    if os.environ.get("WRITE_ERRORS"):
        sections = [
            "\n".join(["", f"## {title}", "", *COLUMNS, *(found[row.shown] for row in section)])
            for title, section in REFUSALS.items()
        ]
        PAGE.write_text(HEAD + "\n".join(sections) + "\n", encoding="utf-8")


@pytest.mark.parametrize("refusal", ROWS)
def test_a_mistake_is_answered_as_the_page_says(refusal, rows, monkeypatch, tmp_path):
    for name in ("data", "models"):  # what the defaults name
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    script, *arguments = refusal.arguments(files)
    with pytest.raises(SystemExit) as left:
        command_line(monkeypatch, script, *arguments)
    status, answer = (1, left.value.code) if isinstance(left.value.code, str) else (left.value.code, "")
    rows[refusal.shown] = refusal.row(status, answer, files)
    if not os.environ.get("WRITE_ERRORS"):
        assert rows[refusal.shown] in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_rows():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(lines) == len(ALL)
    assert all(line.startswith(f"| {refusal.shown} |") for line, refusal in zip(lines, ALL, strict=True))
