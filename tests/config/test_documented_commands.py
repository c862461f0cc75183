"""Every command of README and docs composes, and every error shown there is the one that is printed."""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

import pytest
import tiny
from conf_folder import CONF, ENTRIES, options
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from diffsynth.config import check
from diffsynth.config.texts import as_typed
from make_cache import COMMANDS


def documents() -> list[Path]:
    return [file for file in (tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").rglob("*.md"))) if file.exists()]


def documented(find) -> list:
    """What `find` finds in each document, with the document's name."""
    return [(file.name, found) for file in documents() for found in find(file.read_text(encoding="utf-8"))]


BLOCK = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
ANSWERED = r"\$ python (.*)\n(error: .*)"
COMMAND = rf"[ $]*(\w+=\S+ +)*(\S*python3?|accelerate|torchrun|srun|deepspeed) (.* )?({'|'.join(ENTRIES)})\.py( |$)"


def commands_in(markdown: str) -> list[str]:
    """The command lines of entry scripts in a document's code blocks and code spans, but for those shown to fail."""
    blocks = [re.sub(ANSWERED, "", block) for block in BLOCK.findall(markdown)]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", markdown))
    lines = "\n".join([*blocks, *spans]).replace("\\\n", " ").splitlines()
    return [line.strip(" $") for line in lines if re.match(COMMAND, line)]


def errors_in(markdown: str) -> list[tuple[str, str]]:
    """The command lines that a document shows to fail, each with the error below it."""
    return re.findall(ANSWERED, "\n".join(BLOCK.findall(markdown)))


def filled_in(word: str) -> str:
    """A word of a command line, its `…` replaced by a value: an option if its key is a group, else a text."""
    group, _, option = word.partition("=")
    if "…" in option and (CONF / group).is_dir():
        return f"{group}={next(name for name in options(group) if fnmatch(name, option.replace('…', '*')))}"
    return word.replace("…", "x")


def jobs(line: str) -> list[tuple[str, list[str]]]:
    """The (entry, overrides) that a command line runs, a sweep several; `…` stands for what the reader puts there."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    start, entry = next((n, w.removesuffix(".py")) for n, w in enumerate(words) if w in [f"{e}.py" for e in ENTRIES])
    end = next((n for n, word in enumerate(words) if n > start and set(word) <= set("();<>|&")), len(words))
    given = [filled_in(word) for word in words[start + 1 : end] if word not in ("…", "...")]
    given = [f"command={word}" if entry == "make_cache" and word in COMMANDS else word for word in given]
    with mock.patch("sys.argv", [str(tiny.ROOT / f"{entry}.py"), *given]):
        arguments = get_args_parser().parse_args(as_typed(given, tiny.schema(entry)))
    overrides = OverridesParser.create().parse_overrides(arguments.overrides)
    if not arguments.multirun:
        return [(entry, [override.input_line for override in overrides])]
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return [(entry, overrides) for overrides in batch]


@pytest.mark.parametrize("file, line", documented(commands_in))
def test_every_documented_command_composes_and_passes_the_check(file, line):
    for entry, overrides in jobs(line):
        check(tiny.compose(entry, *overrides), tiny.schema(entry))


@pytest.mark.parametrize("file, shown", documented(errors_in))
def test_every_documented_error_is_what_the_command_line_answers(file, shown, monkeypatch, tmp_path):
    line, error = shown
    script, *arguments = shlex.split(line, comments=True)
    elsewhere = [f"output_root={tmp_path}"] if script == "train.py" else []
    assert tiny.complaint(monkeypatch, *arguments, *elsewhere, script=script).startswith(error)


DOCUMENT = """
Say `python train.py lora.rank=2`, not `train.py`.

```bash
# python train.py commented=out
$ python train.py                                  # the default
python train.py -m lora.rank=4,8 'optimizer.lr=1e-4,2e-4'
accelerate launch --num_processes 2 train.py \\
    model=qwen_image "dataset.path=my pictures" > log
CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node 2 train.py device=cpu && python generate.py seed=[1,2]
```

```
train.py generate.py   # 40 lines each
python train.py model=… optimizer.lr=1e-4 …
accelerate launch examples/qwen_image/model_training/train.py --of another
python generate.py lora_path=outputs/sft-…
$ python train.py lora.rnak=8
error: no such key
```
"""


def test_commands_are_found_in_documents():
    found = [jobs(line) for line in commands_in(DOCUMENT)]
    assert found == [
        [("train", [])],
        [("train", [f"lora.rank={r}", f"optimizer.lr={lr}"]) for r in (4, 8) for lr in ("0.0001", "0.0002")],
        [("train", ["model=qwen_image", "dataset.path=my pictures"])],
        [("train", ["device=cpu"])],
        [("train", ["model=anima", "optimizer.lr=1e-4"])],  # the first of the models
        [("generate", ["lora_path=outputs/sft-x"])],
        [("train", ["lora.rank=2"])],
    ]
    assert errors_in(DOCUMENT) == [("train.py lora.rnak=8", "error: no such key")]
