"""What a flag of DiffSynth-Studio becomes here: each reader of a flag yields some of these."""

from typing import NamedTuple


class Set(NamedTuple):
    """A word of our command, `key=value`.

    Args:
        key: A key of the configuration, or a group of options.
        value: As it is typed.
        otherwise: Reason shown if the key is absent; empty: the flag is refused.
    """

    key: str
    value: str
    otherwise: str = ""


class LeftOut(NamedTuple):
    """A flag that needs nothing here, and why."""

    why: str


class Refused(NamedTuple):
    """A flag that has no counterpart, and what to do."""

    why: str


class Impossible(NamedTuple):
    """A flag without which the command makes no sense, and which has no counterpart."""

    why: str


class Differs(NamedTuple):
    """What our command does in another way than theirs."""

    how: str


Line = Set | LeftOut | Refused | Impossible | Differs
