import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "diffsynth", ROOT / "tests"


def imported(file: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    return imported_by(ast.walk(ast.parse(file.read_text(encoding="utf-8"))), file)


def imported_by(nodes: Iterable[ast.AST], file: Path) -> set[str]:
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in nodes:
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


# What each package may import besides itself; `config` and `report` stand beside the others, `rewards` runs in other
# environments, `importing` is an entry script.
BELOW = {
    "core": set(),
    "diffusion": {"core"},
    "pipelines": {"core", "diffusion"},
    "cache": {"core", "diffusion"},
    "training": {"core", "diffusion", "cache"},
    "plan": {"core", "diffusion", "cache", "training"},
    "report": {"core"},
    "rewards": set(),
    "config": {"core", "report"},
    "importing": {"core", "diffusion", "cache", "training", "plan", "config"},
}


@cache
def modules() -> dict[str, Path]:
    """The package's files by the names of their modules."""
    names = {file: file.relative_to(ROOT).with_suffix("").parts for file in PACKAGE.rglob("*.py")}
    return {".".join(part for part in parts if part != "__init__"): file for file, parts in names.items()}


def folder_of(module: str) -> str:
    """The package that a module's file stands in."""
    return ".".join(modules()[module].parent.relative_to(ROOT).parts)


def needed_modules(file: Path) -> set[str]:
    """The package's modules that a file imports to run, at once or in a function."""
    known, tree = modules(), ast.parse(file.read_text(encoding="utf-8"))
    for_checkers = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    left_out = {inner for node in for_checkers for inner in ast.walk(node)}
    names = imported_by((node for node in ast.walk(tree) if node not in left_out), file)
    return {name if name in known else name.rpartition(".")[0] for name in names} & known.keys()


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    found, left = set(), list(edges[start])
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += edges[name]
    return found


@pytest.mark.parametrize("package", BELOW)
def test_arrows_point_down(package):
    others = [f"diffsynth.{other}" for other in BELOW if other != package and other not in BELOW[package]]
    assert importers(PACKAGE / package, *others) == set()
    assert {file.name for file in PACKAGE.iterdir() if file.is_dir() and file.name != "__pycache__"} <= BELOW.keys()


def test_no_import_leads_back():
    edges = {name: needed_modules(file) - {name} for name, file in modules().items()}
    assert [name for name in edges if name in reachable(name, edges)] == []
    assert any(edges.values())


def test_no_folder_leads_back():
    edges = defaultdict(set)
    for name, file in modules().items():
        edges[folder_of(name)] |= {folder_of(other) for other in needed_modules(file)}
    doors = "diffsynth.diffusion"  # its own files use its folders and are used by them
    edges = {name: others - {name, doors} for name, others in edges.items() if name != doors}
    assert {name for name in edges if name in reachable(name, edges)} == set()


def test_a_folder_holds_at_most_20_files():
    folders = [folder for root in (PACKAGE, TESTS) for folder in [root, *root.rglob("*/")]]
    counts = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert {str(folder): count for folder, count in counts.items() if count > 20} == {}


KNOW_FAMILIES = ("pipelines", "importing")  # the second reads commands of DiffSynth-Studio, which name them
CONF = ROOT / "conf"
# What names models in conf/: two folders, and the choice of each model's default data. The embedded ones are emoji_….
NAME_MODELS = ("model", "experiment", "data.yaml")
PIPELINES = PACKAGE / "pipelines"
PARTS = ("networks", "prompts", "edit_images", "controlnets")  # folders with a file for each family that needs one
SHARED = ("shared", "autoencoders")  # folders of what several families use


def family_files() -> list[Path]:
    return sorted(file for file in PIPELINES.rglob("*.py") if file.name != "__init__.py")


# Tests of the entry scripts and of the benchmarks, and those that need a GPU.
ELSEWHERE = ("scripts", "benchmarks", "cuda", "fuzz")


def test_tests_stand_in_the_folders_of_what_they_test():
    folders = {file.parent.relative_to(TESTS) for file in TESTS.rglob("*/test_*.py")}
    assert {folder for folder in folders if not (PACKAGE / folder).is_dir()} == {Path(name) for name in ELSEWHERE}


@pytest.mark.parametrize("name", ["qwen", "flux", "z_?image", "krea", "ernie", "sd3", "chroma", "wan(?!t|db|g)"])
def test_only_the_file_of_a_family_names_it(name):
    """What is particular to a family stands in pipelines/ and in its YAML; comments may say where a figure is from."""
    files = [file for file in PACKAGE.rglob("*.py") if file.relative_to(PACKAGE).parts[0] not in KNOW_FAMILIES]
    choices = [file for file in CONF.rglob("*.yaml") if file.relative_to(CONF).parts[0] not in NAME_MODELS]
    code = {file.name: re.sub(r"#.*|\bemoji_\w+", "", file.read_text("utf-8")) for file in (*files, *choices)}
    assert [file for file, text in code.items() if re.search(rf"(?i)\b{name}(?!tic|t)|_{name}|{name}_", text)] == []
    assert len(files) > 200 and len(choices) > 50


def test_a_family_is_a_declaration_of_at_most_250_lines():
    """And so is each part of one that stands in a file of its own."""
    lengths = {str(file.relative_to(PIPELINES)): len(file.read_text("utf-8").splitlines()) for file in family_files()}
    assert {name: length for name, length in lengths.items() if length > 250} == {}
    assert {"qwen_image.py", "networks/qwen_image.py"} <= lengths.keys()


@pytest.mark.parametrize(
    "file",
    [file for file in family_files() if file.parent.name in PARTS],
    ids=lambda file: f"{file.parent.name}-{file.stem}",
)
def test_a_part_of_a_family_is_used_by_this_family_alone(file):
    """A part is named as its family, or as the beginning that several variants of one have in common (`flux1`)."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    users = {Path(user) for user in importers(PACKAGE, f"{module}.")}
    assert {user for user in users if not user.stem.startswith(file.stem)} == set()
    assert PIPELINES.relative_to(ROOT) in {user.parent for user in users}


def test_what_families_share_uses_no_family():
    every = {module for module in modules() if module.startswith("diffsynth.pipelines.")}
    own = {module for module in every if module.split(".")[2] in SHARED}
    assert {module: needed_modules(modules()[module]) & (every - own) for module in own} == dict.fromkeys(own, set())


def test_only_the_configuration_knows_hydra():
    knowing = importers(PACKAGE, "hydra", "omegaconf")
    assert knowing and all(name.startswith("diffsynth/config/") for name in knowing)


def test_the_package_and_the_help_need_no_torch():
    assert not torch_imported_by("-c", "import diffsynth")
    assert not torch_imported_by("train.py", "--help")
    assert not torch_imported_by("-m", "diffsynth.rewards.serve", "--help")
    assert torch_imported_by("-c", "import torch")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_entry_scripts_import_only_the_configuration_and_its_schema_at_first(script):
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    light = {
        "diffsynth.config",
        "diffsynth.training.run",
        "diffsynth.plan.run",
        "diffsynth.cache.run",
        "diffsynth.core.ranges",
    }
    assert {name for name in modules if name.startswith("diffsynth")} <= light
