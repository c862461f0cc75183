"""What a mistake is answered: the rows of docs/errors.md, which `make errors` writes and test_errors.py compares."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT

PAGE = ROOT / "docs" / "errors.md"
HEAD = """# What a mistake is answered

Every mistake ends before weights are read, in one line, with exit status 1 ([runs.md](runs.md) lists others). `FOLDER`
stands for a folder with the files of the case. `make errors` runs these commands and writes this page.
"""
COLUMNS = ("| typed | status | answer |", "| --- | --- | --- |")
TRACEBACK = "(DIFFSYNTH_TRACEBACK=1 shows where this was raised)"


@dataclass(frozen=True)
class Refusal:
    """A command that is refused.

    Args:
        command: As it is typed into a shell; `FOLDER` stands for a folder of the case's own.
        files: What the folder holds, by name.
    """

    command: str
    files: Mapping[str, bytes | str] = field(default_factory=dict)

    def arguments(self, folder: Path) -> list[str]:
        """The command's words, its script first."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [word.replace("FOLDER", str(folder)) for word in shlex.split(self.command)]

    def row(self, status: int, answer: str, folder: Path) -> str:
        """The page's line about it."""
        text = answer.replace(str(folder), "FOLDER").replace(f"{ROOT}/", "").replace(TRACEBACK, "").strip()
        cells = [f"`{self.command}`", str(status), " ".join(text.split())]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


REFUSALS = {
    "Keys and options": [
        Refusal("train.py lora.rnak=8"),
    ],
}
