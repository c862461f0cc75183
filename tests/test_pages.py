"""What the pages say of files and code is so; config/test_documented_commands.py is about their commands."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("[dm]*/*/README.md"))]
of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def definitions(source: str) -> dict[str, str]:
    """The source of functions and classes by name, without docstrings and annotations."""
    found = {node.name: node for node in ast.parse(source).body if hasattr(node, "name")}
    for node in found.values():
        for inner in ast.walk(node):
            if isinstance(inner, ast.arg):
                inner.annotation = None
            if isinstance(inner, ast.FunctionDef):
                inner.returns = None
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
                inner.body = inner.body[1:]
    return {name: ast.unparse(node) for name, node in found.items()}


def test_the_page_of_pipelines_builds_the_family_of_the_tests():
    page = (ROOT / "docs" / "pipelines.md").read_text()
    told = definitions("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    written = definitions((ROOT / "tests" / "auraflow.py").read_text())
    assert told == written


FAMILIES = ROOT / "docs" / "families"
FAMILY_PAGES = sorted(set(re.findall(r"^\| \[.*?\]\((\w+\.md)\)", (FAMILIES / "README.md").read_text(), re.MULTILINE)))


@pytest.mark.parametrize("page", FAMILY_PAGES)
def test_pages_of_families_have_the_same_headings(page):
    headings = re.findall(r"^## (.*)$", (FAMILIES / page).read_text(), re.MULTILINE)
    assert headings == ["Sizes", "Commands", "What differs", "Memory", "LoRA files", "What was checked"]


@of_pages
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


@of_pages
def test_cells_of_tables_have_at_most_15_words(page):
    if page.name == "errors.md":  # its cells are what the program answers
        return
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert [cell for cell in cells if len(cell.split()) > 15] == []
