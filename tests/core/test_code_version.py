"""What changes the version of a unit's code, and what does not."""

import importlib
import itertools
import sys
from pathlib import Path

import pytest
from torch import nn

from diffsynth.core.code_version import code_version, forwards
from diffsynth.pipelines import qwen_image
from diffsynth.pipelines.autoencoders.qwen_image import SingleFrameConv3d
from diffsynth.pipelines.qwen_image import QwenImagePipeline, QwenImageVAE

UNIT = '''
"""A unit and its pipeline."""
from . import lists
from .helpers import doubled, halved as half
from .model import Model

SCALE = 2
TABLE = {"a": [1, 2]}
CHOSEN = doubled
UNUSED = 3


class Base:
    factor = 16

    def __init__(self):
        self.offset: int = 5

    def rounded(self, size: int) -> int:
        """A size that can be generated."""
        return size // self.factor * self.factor

    def unused(self):
        return 1


class Unit(Base):
    def process(self, pipe, size: int) -> dict:
        """One step."""
        size = self.rounded(size) * SCALE + self.offset  # why
        total: int = doubled(size) + half(size) + TABLE["a"][0] + CHOSEN(1)
        return {"made": pipe.model.encode(total) + lists.tripled(size or lists.EMPTY), "name": type(self).__name__}
'''
MODEL = """
class Model:
    def encode(self, value):
        return self._inner(value)

    def _inner(self, value):
        return value + 1

    def decode(self, value):
        return value
"""
HELPERS = """
from .constants import STEP


def doubled(value, times=2):
    return value * times + STEP


def halved(value):
    return value / 2


def unused(value):
    return value
"""
FILES = {
    "__init__": "",
    "unit": UNIT,
    "model": MODEL,
    "helpers": HELPERS,
    "constants": "STEP = 1\n",
    "lists": "EMPTY = 0\n\n\ndef tripled(value):\n    return [value] * 3\n",
}
NUMBERS = itertools.count()


@pytest.fixture
def version(tmp_path, monkeypatch):
    """`version(file=(old, new))`: of the unit in a package in which these texts are replaced."""
    monkeypatch.syspath_prepend(tmp_path)

    def of(**changes: tuple[str, str]) -> str:
        package = f"package{next(NUMBERS)}"
        write(tmp_path / package, changes)
        unit = importlib.import_module(f"{package}.unit")
        return code_version([unit.Unit.process], [unit.Unit, unit.Model])[0]

    yield of
    for name in [name for name in sys.modules if name.startswith("package")]:
        del sys.modules[name]


def write(folder: Path, changes: dict[str, tuple[str, str]]) -> None:
    folder.mkdir()
    for name, text in FILES.items():
        old, new = changes.get(name, ("", ""))
        assert old in text
        (folder / f"{name}.py").write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    "what, file, old, new",
    [
        ("nothing, in a package of another name", "unit", "", ""),
        ("a comment", "unit", "# why", "# because"),
        ("a docstring", "unit", '"""One step."""', '"""One of several steps."""'),
        ("a docstring that goes", "unit", '        """One step."""\n', ""),
        ("an annotation", "unit", "size: int) -> dict", "size)"),
        ("an annotation of a variable", "unit", "total: int =", "total ="),
        ("an annotation of an attribute", "unit", "self.offset: int =", "self.offset ="),
        ("formatting", "unit", "self.rounded(size) * SCALE", "(\n            self.rounded(size)\n            * SCALE)"),
        ("quotes", "unit", '"made"', "'made'"),
        ("a constant that is not used", "unit", "UNUSED = 3", "UNUSED = 4"),
        ("a function that is not used", "helpers", "    return value\n", "    return value + 1\n"),
        ("a method that is not used", "unit", "return 1", "return 2"),
        ("another method of the model", "model", "return value\n", "return value * 2\n"),
    ],
)
def test_what_does_not_run_does_not_count(what, file, old, new, version):
    assert version(**{file: (old, new)}) == version(), what


@pytest.mark.parametrize(
    "what, file, old, new",
    [
        ("the method", "unit", "+ self.offset", "- self.offset"),
        ("a constant", "unit", "SCALE = 2", "SCALE = 3"),
        ("a table", "unit", '{"a": [1, 2]}', '{"a": [1, 3]}'),
        ("which function a name stands for", "unit", "CHOSEN = doubled", "CHOSEN = half"),
        ("an attribute of the class", "unit", "factor = 16", "factor = 8"),
        ("an attribute that is set at the start", "unit", "= 5", "= 6"),
        ("a method of a base", "unit", "// self.factor", "% self.factor"),
        ("a method of the model", "model", "self._inner(value)", "self._inner(2 * value)"),
        ("a method that this calls", "model", "value + 1", "value + 2"),
        ("an imported function", "helpers", "value * times", "value ** times"),
        ("its default", "helpers", "times=2", "times=3"),
        ("one that was imported by another name", "helpers", "value / 2", "value // 2"),
        ("a function of an imported module", "lists", "* 3", "* 4"),
        ("a constant of an imported module", "lists", "EMPTY = 0", "EMPTY = 1"),
        ("a constant of a module that an imported function uses", "constants", "STEP = 1", "STEP = 2"),
    ],
)
def test_what_runs_counts(what, file, old, new, version):
    assert version(**{file: (old, new)}) != version(), what


def of_unit(unit: type) -> tuple[str, set[str]]:
    return code_version([unit.process_batch], [unit, QwenImagePipeline, QwenImageVAE])


def test_a_constant_counts_by_its_value(monkeypatch):
    before, _ = of_unit(qwen_image.QwenImageUnit_PromptEmbedder)
    monkeypatch.setattr(qwen_image, "PROMPT_TEMPLATE", qwen_image.PROMPT_TEMPLATE.replace("detailing", "naming"))
    assert of_unit(qwen_image.QwenImageUnit_PromptEmbedder)[0] != before


def test_the_attributes_that_code_uses_are_named():
    _, attributes = of_unit(qwen_image.QwenImageUnit_PromptEmbedder)
    assert {"tokenizer", "text_encoder", "tokenize"} <= attributes
    assert "vae" not in attributes


def test_loading_weights_is_no_part_of_what_a_unit_runs():
    for unit in (qwen_image.QwenImageUnit_PromptEmbedder, qwen_image.QwenImageUnit_InputImageEmbedder):
        assert not of_unit(unit)[1] & {"load_state_dict", "from_pretrained", "safe_open"}


def test_a_network_counts_by_what_its_modules_run_themselves():
    network = nn.Sequential(nn.Linear(1, 1), SingleFrameConv3d(1, 1, 1))
    assert forwards(network) == {SingleFrameConv3d: SingleFrameConv3d.forward}
    assert forwards(nn.Linear(1, 1)) == {}
