import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffsynth"


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) + 1 - node.level], *filter(None, [node.module])]
                if node.level
                else [node.module]
            )
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def importers(folder: Path, *prefixes: str) -> set[str]:
    """Files below a folder that import anything whose name begins with one of the prefixes."""
    files = folder.rglob("*.py") if folder.is_dir() else [folder]
    return {str(file.relative_to(ROOT)) for file in files if any(name.startswith(prefixes) for name in imported(file))}


def torch_imported_by(*command: str) -> bool:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0 and "import time" in result.stderr, result.stderr[-2000:]
    return re.search(r"\| +torch$", result.stderr, re.MULTILINE) is not None


def test_core_knows_neither_diffusion_nor_pipelines():
    assert importers(PACKAGE / "core", "diffsynth.diffusion", "diffsynth.pipelines") == set()


def test_diffusion_knows_no_pipeline():
    assert importers(PACKAGE / "diffusion", "diffsynth.pipelines") == set()
    assert importers(PACKAGE / "pipelines", "diffsynth.core") != set()  # the check itself sees relative imports


@pytest.mark.parametrize("name", ["qwen", "flux", "wan(?!t|db)"])
def test_diffusion_names_no_model(name):
    files = [*(PACKAGE / "diffusion").rglob("*.py"), *(PACKAGE / "core").rglob("*.py")]
    assert [file.name for file in files if re.search(rf"(?i)\b{name}|_{name}|{name}_", file.read_text("utf-8"))] == []


def test_only_the_configuration_knows_hydra():
    knowing = importers(PACKAGE, "hydra", "omegaconf")
    assert knowing and all(name.startswith("diffsynth/config/") for name in knowing)


def test_the_package_and_the_help_need_no_torch():
    assert not torch_imported_by("-c", "import diffsynth")
    assert not torch_imported_by("train.py", "--help")
    assert torch_imported_by("-c", "import torch")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_entry_scripts_import_only_the_configuration_at_first(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.startswith("diffsynth")} == {"diffsynth.config"}
