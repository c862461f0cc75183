"""Prints our commands as a shell script, with what is left out and what differs as its comments."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from .ours import OurCommand


def printed(commands: Sequence[OurCommand | str]) -> str:
    """The text of our script.

    Args:
        commands: Our commands, and the commands of their file that start no training.
    """
    parts = ["\n".join(_command(each)) if isinstance(each, OurCommand) else each for each in commands]
    differs = dict.fromkeys(how for each in commands if isinstance(each, OurCommand) for how in each.differs)
    if differs:
        parts.append("\n".join(["# What differs from DiffSynth-Studio:", *(f"#   {how}" for how in differs)]))
    return "\n\n".join(parts)


def _command(ours: OurCommand) -> Iterator[str]:
    """The lines of one command; they are comments if it cannot run."""
    if ours.problem:
        yield f"# Not possible yet: {ours.problem}"
    lines = [
        f"{'# ' if ours.problem else ''}{shlex.join(ours.words)}",
        *(f"    {shlex.quote(word)}" for word in ours.overrides),
    ]
    yield f" \\\n{'# ' if ours.problem else ''}".join(lines)
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
