"""Words of a command line that are neither flags of Hydra nor `key=value`: what to type instead of them."""

import difflib
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from .explain import explain_key, in_shell, known_here
from .nodes import ConfigError
from .script import compose_choices, is_key, script


def check_words(arguments: Sequence[str]) -> None:
    """Check that each word is a flag of Hydra, its value, or an override.

    Raises:
        ConfigError: A flag is none of Hydra's or lacks its value, a key is written as a flag, has no value, or has
            blanks around its `=`, or a path swallows the next override.
    """
    parser = get_args_parser()
    parser.error = partial(_refuse, arguments)  # argparse exits with status 2 and its usage
    parsed, others = parser.parse_known_args(list(arguments))
    overrides = [*parsed.overrides, *others]
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(_explain_flag(word, arguments))
    for index, word in enumerate(overrides):
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise ConfigError(_explain_word(word, overrides[:index], overrides[index + 1 :]))
        if key != key.rstrip():
            typed = f"{key.strip()}={value.strip()}"
            raise ConfigError(f"{word}: expected key=value, without spaces around =; type {in_shell(typed)}")
        if key.endswith("path"):
            _check_path(word, overrides)


def _refuse(arguments: Sequence[str], message: str) -> NoReturn:
    """Raise argparse's message as an error of this program.

    Raises:
        ConfigError: Always.
    """
    words = [word.partition("=") for word in arguments]
    if not any(name == "--config" for name, _, _ in words):
        raise ConfigError(f"{message}; python {script()}.py --hydra-help lists Hydra's flags")
    index = next(index for index, (name, _, _) in enumerate(words) if name == "--config")
    file = Path(words[index][2] or next(iter(arguments[index + 1 :]), "…/config.yaml"))
    raise ConfigError(
        f"--config: no such flag; to run a saved configuration again type python {script()}.py "
        f"--config-path {in_shell(str(file.absolute().parent))} --config-name {in_shell(file.stem)}"
    )


def _check_path(word: str, overrides: Sequence[str]) -> None:
    """Check that a path has no other override in it, as in `dataset.path="x dataset.height=64"`."""
    key, _, value = word.partition("=")
    found = re.search(r"\s+([\w.]+)=", value)
    if found and not os.path.exists(value) and is_key(found[1], compose_choices(overrides)):
        typed = f"{in_shell(f'{key}={value[: found.start()]}')} {value[found.start() :].strip()}"
        raise ConfigError(f"{word}: {found[1]}= stands in the quotes of {key}; type {typed}")


def _explain_flag(flag: str, arguments: Sequence[str]) -> str:
    name, equals, value = flag.lstrip("-").partition("=")
    after = arguments[arguments.index(flag) + 1 :]
    value = value if equals else ",".join(takewhile(_is_bare, after))
    flags = [option for action in get_args_parser()._actions for option in action.option_strings]
    known = _known(name, value)
    if not known and (near := difflib.get_close_matches(flag, flags, 1, cutoff=0.75)):  # 0.6 takes keys for flags
        return f"{flag}: no such flag; did you mean {near[0]}?"
    return f"{flag}: keys are written without dashes; {known or explain_key(name)}"


def _explain_word(word: str, before: Sequence[str], after: Sequence[str]) -> str:
    bare = list(takewhile(_is_bare, after))
    if after and after[0].startswith("="):  # key = value, key =value
        known = _known(word, after[0][1:] or "".join(after[1:2]))
    elif before and before[-1].endswith("="):  # key= value
        known = f"type {in_shell(' '.join([before[-1] + word, *bare]))}"
    else:
        known = _known(word, " ".join(bare)) or _without_key(word, before, bare)
    return f"{word}: expected key=value{'' if before else ', without spaces around ='}; {known or explain_key(word)}"


def _without_key(word: str, before: Sequence[str], bare: Sequence[str]) -> str:
    """Say which key a value may belong to; an empty text if it rather is a key."""
    keys = set(compose_choices([]))
    if before:
        typed = in_shell(" ".join([before[-1], word, *bare]))
        return f"if it belongs to the value before it, type quotes around both: {typed}"
    if "lora_path" in keys and word.endswith(".safetensors"):
        return f"type {in_shell(f'lora_path={word}')}"
    if "prompt" in keys and not difflib.get_close_matches(word, keys):
        return f"type {in_shell(' '.join([f'prompt={word}', *bare]))}"
    return ""


def _is_bare(word: str) -> bool:
    return "=" not in word and not word.startswith("-")


def _known(name: str, value: str) -> str:
    """Return what to do about a key, this trainer's or another's; an empty text if it is neither."""
    config = compose_choices([])
    own = in_shell(f"{name}={value or '…'}")
    return known_here(name, value, config) or (f"type {own}" if is_key(name, config) else "")
