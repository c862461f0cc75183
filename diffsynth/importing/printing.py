"""Prints our commands as a shell script, with what is left out and what differs as its comments."""

import shlex
from collections.abc import Iterator, Mapping, Sequence

from .ours import OurCommand
from .theirs import Theirs

ALIKE = (
    "Weights are trained in fp32, theirs in bf16.",
    "Samples, noise and timesteps follow from seed=0, theirs from no seed.",
)
NOT_EXACT = (
    "The first 5 optimizer steps have the whole learning rate, theirs a third of it: torch's ConstantLR begins so.",
    "The gradient is clipped to norm 1, theirs is not; max_grad_norm=null does not clip.",
    "Timesteps are fp32, theirs are rounded to bf16; task.exact_upstream=true rounds them, too.",
)
COUNTS = "Steps are optimizer steps; theirs are micro-batches of one process."


def printed(commands: Sequence[OurCommand | str], theirs: Sequence[Theirs]) -> str:
    """The text of our script.

    Args:
        commands: Our commands, and those of the file that start no training.
        theirs: Their commands.
    """
    ours = [command for command in commands if isinstance(command, OurCommand)]
    parts = ["\n".join(_command(command)) if isinstance(command, OurCommand) else command for command in commands]
    exact = any(each.exact for each in theirs)
    said = dict.fromkeys(how for command in ours for how in command.differs)
    if any(each.stage != "data_process" for each in theirs):
        said |= dict.fromkeys([*([] if exact else NOT_EXACT), *ALIKE, COUNTS])
    differs = ["# What differs from DiffSynth-Studio:", *(f"#   {how}" for how in said)] if said else []
    return "\n\n".join([*parts, *(["\n".join(differs)] if differs else [])])


def _command(ours: OurCommand) -> Iterator[str]:
    """The lines of one command; they are comments if it cannot run."""
    if ours.problem:
        yield f"# Not possible yet: {ours.problem}"
    lines = [shlex.join(ours.words), *(f"    {shlex.quote(word)}" for word in ours.overrides)]
    yield "\n".join(f"# {line}" for line in lines) if ours.problem else " \\\n".join(lines)
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
