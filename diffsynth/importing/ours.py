"""Puts our command together from what the readers of the flags say, and checks it as its script would."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..cache.run import CacheRun
from ..config import ConfigError
from ..config.commands import configuration
from ..training.run import DistillRun, Run
from .flags import FLAGS, reader
from .launch import Launch
from .lines import Differs, Impossible, LeftOut, Line, Refused, Set
from .tasks import habits
from .theirs import ALWAYS, Reader, Theirs

SCHEMAS = {"train": Run, "make_cache": CacheRun, "distill": DistillRun}
OF_TRAINING = {each.name for each in fields(Run)} - {each.name for each in fields(CacheRun)}
ABSENT = object()


@dataclass
class OurCommand:
    """Our command for one of theirs.

    Args:
        words: The launcher's words, and the script.
        overrides: The words after the script.
        left_out, refused: Flags that are no word of the command, by what to say of them.
        unknown: Flags that nobody knows, with their values.
        differs: What it does in another way than theirs.
        problem: Why the command cannot run yet; empty if it can.
    """

    words: list[str]
    overrides: list[str]
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    unknown: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def is_complete(self) -> bool:
        return not (self.problem or self.refused or self.unknown)


@dataclass
class OurStatement:
    """A statement of their file, with our commands in the place of theirs.

    Args:
        parts: Our commands, and the text around them.
        problem: Why it is not carried over as a whole; empty if it is.
    """

    parts: list[OurCommand | str]
    problem: str = ""

    @property
    def commands(self) -> list[OurCommand]:
        return [part for part in self.parts if isinstance(part, OurCommand)]

    @property
    def runs(self) -> bool:
        """Whether it does all that theirs does; one that does not is a comment."""
        return not self.problem and all(each.is_complete for each in self.commands)


def our_command(theirs: Theirs, launch: Launch, problem: str = "") -> OurCommand:
    """Our command for one of theirs.

    Args:
        theirs: Their command.
        launch: How it starts.
        problem: Why there is no model for it; empty if there is one.
    """
    script = _script(theirs)
    ours = OurCommand([*launch.words, f"{script}.py"], [], problem=problem)
    if theirs.folder:
        ours.differs.append(
            f"{theirs.folder} is left out: start the command in the folder of train.py. Its paths, such as that of the "
            "data, start there, too."
        )
    words: dict[str, tuple[str, Set]] = {}
    others = habits(theirs) if script != "make_cache" else ()
    for flag, line in [*_read(theirs, ours), *launch.lines, *(("", line) for line in others)]:
        if isinstance(line, Set):
            words.setdefault(line.key, (flag, line))
        else:
            _say(ours, flag, line, theirs)
    if script == "make_cache":
        words = _without_training(words, ours, theirs)
    words = {"model": ("", Set("model", theirs.model.name if theirs.model else "…")), **words}
    ordered = sorted(words.values(), key=lambda each: not _is_choice(each[1], theirs))
    ours.overrides = [_typed(line) for _, line in ordered]
    if theirs.model:
        _settle(ours, script, ordered, theirs)
    return ours


def _script(theirs: Theirs) -> str:
    if theirs.stage == "data_process":
        return "make_cache"
    return "distill" if theirs.method == "trajectory_imitation" else "train"


def _read(theirs: Theirs, ours: OurCommand) -> Iterator[tuple[str, Line]]:
    """What each flag becomes, in the order of the table."""
    known = list(FLAGS)
    flags = sorted({*theirs.flags, *ALWAYS}, key=lambda flag: _place(flag, known))
    for flag in flags:
        value, read = theirs[flag], reader(flag)
        if read is None:
            ours.unknown.append(f"--{flag} {value}")
        elif flag in theirs.variables:
            ours.refused[f"the shell puts another text into {value}; write that text into the file"].append(flag)
        else:
            yield from _lines(flag, value, read, theirs)


def _lines(flag: str, value: str, read: Reader, theirs: Theirs) -> Iterator[tuple[str, Line]]:
    try:
        yield from ((flag, line) for line in [*read(value, theirs)])
    except ValueError as error:
        yield flag, Impossible(str(error))


def _place(flag: str, known: Sequence[str]) -> int:
    name = flag if flag in known else flag.removeprefix("dmd2_")
    return known.index(name) if name in known else len(known)


def _say(ours: OurCommand, flag: str, line: Line, theirs: Theirs) -> None:
    """Note what to say of a flag; nothing of one that only has its default."""
    is_of_launcher = flag.startswith("--")
    if isinstance(line, Differs):
        ours.differs.append(line.how)
    elif isinstance(line, Impossible):
        ours.problem = ours.problem or (line.why if line.why.startswith("--") else f"--{flag}: {line.why}")
    elif theirs.says(flag) or is_of_launcher:
        said = ours.refused if isinstance(line, Refused) else ours.left_out
        said[line.why].append(flag)


def _without_training(
    words: Mapping[str, tuple[str, Set]], ours: OurCommand, theirs: Theirs
) -> dict[str, tuple[str, Set]]:
    """The words that make_cache.py has, which trains nothing."""
    kept = {}
    for key, (flag, line) in words.items():
        if key.partition(".")[0] in OF_TRAINING or flag == "gradient_accumulation_steps":
            _say(ours, flag, LeftOut("make_cache.py trains nothing"), theirs)
        else:
            kept[key] = flag, line
    return kept


def _is_choice(line: Set, theirs: Theirs) -> bool:
    """Whether a word chooses an option of a group."""
    return (theirs.project / "conf" / line.key).is_dir()


def _typed(line: Set) -> str:
    return f"{line.key}={line.value}"


def _settle(ours: OurCommand, script: str, words: Sequence[tuple[str, Set]], theirs: Theirs) -> None:
    """Leave out the words that the configuration has already, and those that it has no key for; then check the rest."""
    path, schema = theirs.project / f"{script}.py", SCHEMAS[script]
    choices = [_typed(line) for _, line in words if _is_choice(line, theirs)]
    try:
        before = configuration(path, choices, schema)
        known = [each for each in words if _has_key(ours, before, *each, theirs)]
        after = configuration(path, [_typed(line) for _, line in known], schema, checked=True)
        changed = [line for _, line in known if _is_choice(line, theirs) or _value(before, line) != _value(after, line)]
        ours.overrides = [_typed(line) for line in changed]
    except ConfigError as error:
        ours.problem = ours.problem or str(error)


def _has_key(ours: OurCommand, before: Mapping, flag: str, line: Set, theirs: Theirs) -> bool:
    found = line.key.startswith("+") or _is_choice(line, theirs) or _value(before, line) is not ABSENT
    if not found:
        why = f"there is no key {line.key} yet; leave it out"
        _say(ours, flag, LeftOut(line.otherwise) if line.otherwise else Refused(why), theirs)
    return found


def _value(config: Any, line: Set) -> Any:
    """The value of a word's key in a configuration."""
    for name in line.key.lstrip("+").split("."):
        if not isinstance(config, Mapping) or name not in config:
            return ABSENT
        config = config[name]
    return config
