"""docs/errors.md says what mistakes are answered; each line is what the command answers now."""

import os

import pytest
from refusals import COLUMNS, HEAD, PAGE, REFUSALS
from tiny import command_line

DEFAULT = 6  # every so many rows are tried by default; `-m ""` tries all
ALL = [refusal for section in REFUSALS.values() for refusal in section]
ROWS = [pytest.param(row, id=row.command, marks=[pytest.mark.slow] if n % DEFAULT else []) for n, row in enumerate(ALL)]


@pytest.fixture(scope="module")
def rows():
    """The lines of the page by command; `make errors` writes the page with what the tests have found."""
    found = {}
    yield found
    if os.environ.get("WRITE_ERRORS"):
        sections = [
            "\n".join(["", f"## {title}", "", *COLUMNS, *(found[row.command] for row in section)])
            for title, section in REFUSALS.items()
        ]
        PAGE.write_text(HEAD + "\n".join(sections) + "\n", encoding="utf-8")


@pytest.mark.parametrize("refusal", ROWS)
def test_a_mistake_is_answered_as_the_page_says(refusal, rows, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    script, *arguments = refusal.arguments(tmp_path)
    with pytest.raises(SystemExit) as left:
        command_line(monkeypatch, script, *arguments)
    status, answer = (1, left.value.code) if isinstance(left.value.code, str) else (left.value.code, "")
    rows[refusal.command] = refusal.row(status, answer, tmp_path)
    if not os.environ.get("WRITE_ERRORS"):
        assert rows[refusal.command] in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_rows():
    commands = [line.split("`")[1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert commands == [refusal.command.replace("|", "\\|") for refusal in ALL]
