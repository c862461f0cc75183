"""Reads the commands of DiffSynth-Studio: a shell script that launches its trainings, or a run's training_args.json."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from ..core.json_text import parse_object
from ..core.regular import require_regular
from .shell import RESERVED, Simple, Word, statements

TORCHRUN = ("torch.distributed.run", "torch.distributed.launch")  # modules that are torchrun
LAUNCHERS = ("accelerate", "python", "python3", "torchrun")
# Flags that only a training has; validation scripts have none of them.
OF_TRAINING = {"model_id_with_origin_paths", "model_paths", "dataset_base_path"}
MAY_BE_EMPTY = {"lora_target_modules"}  # empty, it means layers that are found by their shapes
FOLDER = "our commands start in the folder of train.py, and their paths, such as that of the data, start there"


@dataclass(frozen=True)
class Command:
    """A command of DiffSynth-Studio.

    Args:
        flags: The values of its flags as texts; `true` for a flag without a value.
        script: The Python file that it runs; empty if the file does not say.
        launcher: The launcher's own words, such as `--num_processes 2`.
        variables: Flags in whose values the shell puts another text, which the file does not say.
        problem: Why it cannot be read; empty if it can.
        folder: The `cd …` in front of it, which is left out; empty if there is none.
    """

    flags: Mapping[str, str]
    script: str = ""
    launcher: tuple[str, ...] = ()
    variables: frozenset[str] = frozenset()
    problem: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Statement:
    """A statement of a script: trainings, and the text around them as it stands there.

    Args:
        parts: Commands and texts, in their order.
        problem: Why it is not carried over as a whole; empty if it is.
    """

    parts: tuple[Command | str, ...]
    problem: str = ""

    @property
    def commands(self) -> list[Command]:
        return [part for part in self.parts if isinstance(part, Command)]


def read_commands(path: str | Path) -> list[Statement]:
    """Return the statements of a file in their order.

    Raises:
        ValueError: The file has no training command, or cannot be read.
        FileNotFoundError: There is no such file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a script of DiffSynth-Studio, or a training_args.json."
        )
    require_regular(path)
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    if re.match(r'\s*\{\s*["}]', text):
        return [Statement((Command(dict(_of_json(parse_object(text, str(path))))),))]
    found = _in_shell(text, path)
    if not any(each.commands for each in found):
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


def _in_shell(text: str, path: str | Path) -> list[Statement]:
    try:
        return [_statement(text, each.commands, each.start, each.end) for each in statements(text)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _statement(text: str, simples: Sequence[Simple], start: int, end: int) -> Statement:
    """A statement whose trainings are taken out of its text."""
    owns = [_own(each) for each in simples]
    trains = any(map(_trains, owns))
    if not trains and all(_changes_folder(words) for words in owns):
        return Statement((text[start:end],), FOLDER)
    parts: list[Command | str] = []
    problem, folder, at = "", "", start
    for each, words in zip(simples, owns, strict=True):
        if _trains(words):
            first, last = words[_place_of_launcher(words)].start, words[-1].end
            inside = [f" {text[a:b]}" for a, b in each.redirections if first < a < last]
            parts += [text[at:first], _command(words, text, folder), *inside]
            at = last
        elif trains and _changes_folder(words) and each.operator in ("&&", ";", "\n"):
            folder = text[words[0].start : words[-1].end]
            parts.append(text[at : words[0].start])
            at = min(_after_blanks(text, each.end), end)
        elif foreign := _foreign(words):
            problem = f"{foreign} is a Python script that is not of this project"
    parts.append(text[at:end])
    return Statement(tuple(part for part in parts if part), problem)


def _changes_folder(words: Sequence[Word]) -> bool:
    return bool(words) and words[0].text in ("cd", "pushd", "exit")


def _after_blanks(text: str, at: int) -> int:
    return at + len(text[at:]) - len(text[at:].lstrip())


def _own(each: Simple) -> list[Word]:
    """The words of a command without those of the loop or the condition around it."""
    before = len(list(takewhile(lambda word: word.text in RESERVED, each.words)))
    return each.words[before:]


def _place_of_script(words: Sequence[Word]) -> int:
    return next((number for number, word in enumerate(words) if word.text.endswith(".py")), len(words))


def _trains(words: Sequence[Word]) -> bool:
    place = _place_of_script(words)
    if place == len(words):
        return False
    flags = _flags([word.text for word in words[place + 1 :]])
    return bool(flags) and (words[place].text.endswith("train.py") or bool(flags.keys() & OF_TRAINING))


def _place_of_launcher(words: Sequence[Word]) -> int:
    """The number of the last launcher before the script; words before it, such as `nohup`, stay."""
    script = _place_of_script(words)
    return max((n for n in range(script) if Path(words[n].text).name in LAUNCHERS), default=script)


def _foreign(words: Sequence[Word]) -> str:
    """The Python script that a command runs and that is not here; empty if it runs none."""
    script = _place_of_script(words)
    return words[script].text if _place_of_launcher(words) < script else ""


def _command(words: Sequence[Word], text: str, folder: str) -> Command:
    script, first = _place_of_script(words), _place_of_launcher(words)
    flags = _flags([word.text for word in words[script + 1 :]])
    texts, launcher = [word.text for word in words], words[first + 1 : script]
    problem = ""
    if "" in flags:
        problem = f"{flags.pop('')!r} after {texts[script]} belongs to no flag; expected --flag value"
    elif any(word.expands for word in launcher):
        typed = text[words[first].start : words[script].start].strip()
        problem = f"{typed}: the shell puts a text into it that the file does not say; write it into the file"
    elif first == script and (others := [word for word in texts[:script] if "=" not in word]):
        problem = f"{others[0]!r} starts {texts[script]}; expected accelerate launch {texts[script]} …"
    return Command(
        flags, texts[script], _options(texts[first:script]), _variables(words[script + 1 :]), problem, folder
    )


def _options(words: Sequence[str]) -> tuple[str, ...]:
    """The launcher's options, without what says which launcher it is; torchrun's stays, which has other names."""
    program, *rest = words or [""]
    if rest[:1] == ["-m"]:
        program, rest = "torchrun" if rest[1:2] and rest[1] in TORCHRUN else "accelerate", rest[2:]
    if rest[:1] == ["launch"]:
        rest = rest[1:]
    return ("torchrun", *rest) if Path(program).name == "torchrun" else tuple(rest)


def _variables(words: Sequence[Word]) -> frozenset[str]:
    found, name = set(), ""
    for word in words:
        name = word.text.removeprefix("--").partition("=")[0] if word.text.startswith("--") else name
        found |= {name} if word.expands else set()
    return frozenset(found)


def _flags(words: Sequence[str]) -> dict[str, str]:
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
