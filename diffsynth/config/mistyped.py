"""Words of a command line that are neither flags of Hydra nor `key=value`: what to type instead of them."""

from collections.abc import Sequence
from itertools import takewhile

from hydra._internal.utils import get_args_parser

from .explain import explain_key, in_shell, typed_here
from .nodes import ConfigError
from .script import compose_choices, is_key


def check_words(arguments: Sequence[str]) -> None:
    """Check that each word is a flag of Hydra, its value, or an override.

    Raises:
        ConfigError: A key is written as a flag, has no value, or has blanks around its `=`.
    """
    parsed, others = get_args_parser().parse_known_args(list(arguments))
    for word in others:
        if word.startswith("-"):
            raise ConfigError(_explain_flag(word, arguments))
    overrides = [*parsed.overrides, *others]
    for index, word in enumerate(overrides):
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise ConfigError(_explain_word(word, overrides[:index], overrides[index + 1 :]))
        if key != key.rstrip():
            typed = f"{key.strip()}={value.strip()}"
            raise ConfigError(f"{word}: expected key=value, without spaces around =; type {in_shell(typed)}")


def _explain_flag(flag: str, arguments: Sequence[str]) -> str:
    name, equals, value = flag.lstrip("-").partition("=")
    after = arguments[arguments.index(flag) + 1 :]
    value = value if equals else ",".join(takewhile(_is_bare, after))
    typed = _spelled(name, value)
    known = f"type {typed}" if typed else explain_key(name)
    return f"{flag}: keys are written without dashes; {known}"


def _explain_word(word: str, before: Sequence[str], after: Sequence[str]) -> str:
    bare = list(takewhile(_is_bare, after))
    if after and after[0].startswith("="):  # key = value, key =value
        typed = _spelled(word, after[0][1:] or "".join(after[1:2]))
    elif before and before[-1].endswith("="):  # key= value
        typed = in_shell(" ".join([before[-1] + word, *bare]))
    else:
        typed = _spelled(word, " ".join(bare))
    if not typed and before:
        typed = in_shell(" ".join([before[-1], word, *bare]))
        return f"{word}: expected key=value; if it belongs to the value before it, type quotes around both: {typed}"
    return f"{word}: expected key=value, without spaces around =; {f'type {typed}' if typed else explain_key(word)}"


def _is_bare(word: str) -> bool:
    return "=" not in word and not word.startswith("-")


def _spelled(name: str, value: str) -> str:
    """Return what to type for a key, this trainer's or another's; an empty text if it is neither."""
    config = compose_choices([])
    own = in_shell(f"{name}={value or '…'}") if is_key(name, config) else ""
    return typed_here(name, value, config) or own
