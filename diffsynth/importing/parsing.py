"""Reads the commands of DiffSynth-Studio: a shell script that launches its trainings, or a run's training_args.json."""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..core.json_text import parse_object
from ..core.regular import require_regular

LAUNCHERS = ("accelerate", "python", "python3", "")
SEPARATORS = ";\n"  # of the shell's commands; && stands between blanks
END = re.compile(r"\d*>.*|\|.*|&|#.*")  # a word with which the flags end: a log, a pipe, the background, a comment
# Flags that only a training has; validation scripts have none of them.
OF_TRAINING = {"model_id_with_origin_paths", "model_paths", "dataset_base_path"}
MAY_BE_EMPTY = {"lora_target_modules"}  # empty, it means layers that are found by their shapes


@dataclass(frozen=True)
class Command:
    """A command of DiffSynth-Studio.

    Args:
        flags: The values of its flags as texts; `true` for a flag without a value.
        script: The Python file that it runs; empty if the file does not say.
        before: The words before the launcher, such as `CUDA_VISIBLE_DEVICES=0`.
        launcher: The launcher's own words, such as `--num_processes 2`.
    """

    flags: Mapping[str, str]
    script: str = ""
    before: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()


def read_commands(path: str | Path) -> list[Command | str]:
    """Return the commands of a file in their order; those that start no training are texts.

    Raises:
        ValueError: The file has no training command, or cannot be read.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a script of DiffSynth-Studio, or a training_args.json."
        )
    require_regular(path)
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    if text.lstrip().startswith("{"):
        return [Command(dict(_of_json(parse_object(text, str(path)))))]
    found = [_command(words, path) for words in _in_shell(text, path)]
    if not any(isinstance(command, Command) for command in found):
        raise ValueError(
            f"{path} has no command of DiffSynth-Studio; expected a script with `accelerate launch …/train.py --…`, or "
            "the training_args.json of a run."
        )
    return found


def _of_json(arguments: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    for flag, value in arguments.items():
        is_given = value is not None and value is not False and value != ""
        if is_given or (value == "" and flag in MAY_BE_EMPTY):
            yield flag, "true" if value is True else str(value)


def _in_shell(text: str, path: str | Path) -> Iterator[list[str]]:
    """Yield the words of each command of a shell script."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\[ \t]*\n", " ", "\n".join(lines))
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=SEPARATORS)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words = []
    try:
        for word in [*lexer, "\n"]:
            if word == "&&" or (word and set(word) <= set(SEPARATORS)):
                yield from [words] if words else []
                words = []
            else:
                words.append(word)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; close the quote that is open.") from error


def _command(words: list[str], path: str | Path) -> Command | str:
    start = next((number for number, word in enumerate(words) if word.endswith(".py")), len(words))
    flags = _flags(list(takewhile(lambda word: not END.fullmatch(word), words[start + 1 :])))
    if not (words[start : start + 1] and (words[start].endswith("train.py") or flags.keys() & OF_TRAINING)):
        # A script of theirs is not here; the other commands, such as downloads, do the same here.
        return f"{'# Not carried over: ' if words[start:] else ''}{shlex.join(words)}"
    if "" in flags:
        raise ValueError(f"{path}: {flags['']!r} after {words[start]} belongs to no flag; expected --flag value.")
    before = list(takewhile(lambda word: "=" in word, words))
    program, *typed = words[len(before) : start] or [""]
    if Path(program).name not in LAUNCHERS:
        raise ValueError(f"{path}: {program!r} starts {words[start]}; expected accelerate launch {words[start]} …")
    return Command(flags, words[start], tuple(before), tuple(typed[1:] if typed[:1] == ["launch"] else typed))


def _flags(words: list[str]) -> dict[str, str]:
    """The values of flags; words before the first flag have an empty name."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found[name] = [value] if equals else []
        else:
            found.setdefault(name, []).append(word)
    texts = {name: " ".join(values) if values else "true" for name, values in found.items()}
    return {name: text for name, text in texts.items() if text or name in MAY_BE_EMPTY}
