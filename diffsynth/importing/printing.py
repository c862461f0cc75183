"""Prints our commands as a shell script, with what is left out and what differs as its comments."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from .ours import OurCommand, OurStatement


def printed(statements: Sequence[OurStatement]) -> str:
    """The text of our script."""
    parts = ["\n".join(_statement(each)) for each in statements]
    differs = list(_differs([command for each in statements for command in each.commands]))
    if differs:
        parts.append("\n".join(["# What differs from DiffSynth-Studio:", *(f"#   {how}" for how in differs)]))
    return "\n\n".join(parts)


def _differs(commands: Sequence[OurCommand]) -> Iterator[str]:
    """What differs, with the numbers of the commands that it is true of, where it is not true of all."""
    for how in dict.fromkeys(how for each in commands for how in each.differs):
        numbers = [str(number) for number, each in enumerate(commands, 1) if how in each.differs]
        named = f"Command{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} of {len(commands)}: "
        yield how if len(numbers) == len(commands) else f"{named}{how}"


def _statement(ours: OurStatement) -> Iterator[str]:
    """The lines of one statement; they are comments if it cannot run."""
    if ours.problem:
        yield f"# {'Not possible yet' if ours.commands else 'Not carried over'}: {ours.problem}"
    for each in ours.commands:
        if each.problem:
            yield f"# Not possible yet: {each.problem}"
        elif not each.is_complete:
            yield "# Not complete; see what is refused or unknown below, then take away the # in front of its lines:"
    text = "".join(part if isinstance(part, str) else _typed(part) for part in ours.parts)
    yield text if ours.runs else "\n".join(f"# {line}" for line in text.split("\n"))
    for each in ours.commands:
        yield from _comments(each)


def _typed(ours: OurCommand) -> str:
    lines = [shlex.join(ours.words), *(f"    {shlex.quote(word)}" for word in ours.overrides)]
    return " \\\n".join(lines)


def _comments(ours: OurCommand) -> Iterator[str]:
    yield from _said("Left out", ours.left_out)
    yield from _said("Refused", ours.refused)
    if ours.unknown:
        yield "# Unknown flags, which no script of DiffSynth-Studio that we know has:"
        yield from (f"#   {flag}" for flag in ours.unknown)


def _said(title: str, flags: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if flags:
        yield f"# {title}:"
    for why, names in flags.items():
        flags = ", ".join(f"--{name.removeprefix('--')}" for name in dict.fromkeys(names))
        yield f"#   {flags}: {why}"
