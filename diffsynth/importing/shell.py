"""Cuts a shell script into statements, simple commands and words, each with its place in the text.

The grammar is that of https://pubs.opengroup.org/onlinepubs/9799919799/utilities/V3_chap02.html, with bash's arrays,
`&>` and `|&`. Nothing is expanded: a word that the shell would expand says so.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

# A backslash before blanks and a line's end joins lines, too, and a comment may stand between joined lines.
BLANK = re.compile(r"(?:[ \t]|\\[ \t]*\n(?:[ \t]*#.*\n)*)+")
COMMENT = re.compile(r"#.*")
GROUP_COMMENT = re.compile(r"\s#.*")
REDIRECTION = re.compile(r"(?:\d+|\{\w+\})?(?:<<<|<<-?|<>|<&|>>|>&|>\||[<>](?!\())|&>>|&>")
OPERATOR = re.compile(r"&&|\|\||\|&|;;&|;;|;&|[;&|\n()]")
PLAIN = re.compile(r"[^ \t\n;&|<>()'\"\\$`]+")
NAME = re.compile(r"\$(\w+|[@*#?!$-])?")
EXPANSION = re.compile(r"(?<!\\)(?:\$[\w{(@*#?!$-]|`)")
ENDS = ";", "&", "\n"  # the operators that end a statement outside of loops and the like
OPENING = {"for", "while", "until", "if", "case", "select", "{"}
CLOSING = {"done", "fi", "esac", "}"}
# Words before a command that belong to the loop or the condition around it.
RESERVED = OPENING - {"for", "case", "select"} | {"do", "then", "else", "elif", "!"}


class Word(NamedTuple):
    """A word of a command.

    Args:
        text: As the command gets it.
        start, end: Its place in the script.
        expands: Whether the shell puts another text into it: a variable, the output of a command, the home folder.
    """

    text: str
    start: int
    end: int
    expands: bool


class Simple(NamedTuple):
    """A simple command.

    Args:
        words: Its words.
        redirections: The places of its redirections, here-documents included.
        operator: What stands behind it; empty at the end of the script.
        end: The place behind the operator.
    """

    words: list[Word]
    redirections: list[tuple[int, int]]
    operator: str
    end: int

    @property
    def places(self) -> list[tuple[int, int]]:
        """The places of its words, its redirections, and of an operator that belongs to the text of the statement."""
        operator = [(self.end - 1, self.end)] if self.operator in ("(", ")", "&") else []
        return [*((word.start, word.end) for word in self.words), *self.redirections, *operator]


class Statement(NamedTuple):
    """What the shell runs at once: commands that `&&`, `||` or `|` join, or a whole loop; with its place."""

    commands: list[Simple]
    start: int
    end: int


def statements(script: str) -> Iterator[Statement]:
    """The statements of a script, whose lines end with \\n.

    Raises:
        ValueError: A quote or a bracket is open.
    """
    commands: list[Simple] = []
    blocks = parentheses = 0
    for each in _simple_commands(script):
        commands.append(each)
        blocks += _blocks(each)
        # A parenthesis that closes none is behind a pattern of `case`.
        parentheses = max(parentheses + {"(": 1, ")": -1}.get(each.operator, 0), 0)
        if each.operator in ("", *ENDS) and blocks <= 0 and parentheses == 0:
            yield from _statement(commands)
            commands, blocks = [], 0
    yield from _statement(commands)


def _statement(commands: list[Simple]) -> Iterator[Statement]:
    places = [place for each in commands for place in each.places]
    if places:
        yield Statement(commands, min(start for start, _ in places), max(end for _, end in places))


def _blocks(each: Simple) -> int:
    """How many loops and conditions begin with a command, less those that end with it."""
    count = 0
    for word in each.words:
        count += (word.text in OPENING) - (word.text in CLOSING)
        if word.text not in RESERVED:
            break
    return count


def _simple_commands(script: str) -> Iterator[Simple]:
    words: list[Word] = []
    redirections: list[tuple[int, int]] = []
    documents: list[str] = []
    at = 0
    while at < len(script):
        if found := BLANK.match(script, at) or COMMENT.match(script, at):
            at = found.end()
        elif found := REDIRECTION.match(script, at):
            target = _word(script, _after_blanks(script, found.end()))
            redirections.append((at, target.end))
            documents += [target.text] if found[0].endswith(("<<", "<<-")) else []
            at = target.end
        elif found := OPERATOR.match(script, at):
            at = found.end()
            if documents and found[0] == "\n":
                at = _after_documents(script, at, documents)
                redirections.append((found.start(), at - 1))
            yield Simple(words, redirections, found[0], at)
            words, redirections, documents = [], [], [] if found[0] == "\n" else documents
        else:
            words.append(_word(script, at))
            at = words[-1].end
    yield Simple(words, redirections, "", at)


def _after_blanks(script: str, at: int) -> int:
    found = BLANK.match(script, at)
    return found.end() if found else at


def _after_documents(script: str, at: int, documents: list[str]) -> int:
    """The place behind the here-documents that begin at one, each of which ends with a line of its own."""
    for delimiter in documents:
        found = re.compile(rf"^\t*{re.escape(delimiter)}$\n?|\Z", re.MULTILINE).search(script, at)
        at = found.end()
    return at


def _word(script: str, start: int) -> Word:
    text, at, expands = "", start, script.startswith("~", start)
    while at < len(script):
        part, end, is_expanded = _part(script, at, is_first=at == start)
        if end == at:
            break
        text, at, expands = text + part, end, expands or is_expanded
    return Word(text, start, at, expands)


def _part(script: str, at: int, is_first: bool) -> tuple[str, int, bool]:
    """A part of a word: its text, its end, and whether the shell expands it; nothing where the word ends."""
    if found := PLAIN.match(script, at):
        return found[0], found.end(), False
    sign = script[at]
    if sign == "'":
        end = _closed(script, at, script.find("'", at + 1))
        return script[at + 1 : end], end + 1, False
    if sign == '"':
        end = _end_of_quotes(script, at)
        inner = script[at + 1 : end]
        return re.sub(r"\\([\\\"$`])|\\\n", r"\1", inner), end + 1, bool(EXPANSION.search(inner))
    if sign == "\\" and not BLANK.match(script, at):
        return script[at + 1 : at + 2], min(at + 2, len(script)), False
    if sign in "$`":
        end = _end_of_expansion(script, at)
        return script[at:end], end, end - at > 1
    if script.startswith(("<(", ">("), at):
        end = _end_of_group(script, at + 2, ")")
        return script[at:end], end, True
    if sign == "(" and not is_first and script[at - 1] == "=":  # an array
        end = _end_of_group(script, at + 1, ")")
        return script[at:end], end, True
    return "", at, False


def _closed(script: str, start: int, end: int) -> int:
    if end < 0:
        line = script.count("\n", 0, start) + 1
        raise ValueError(f"line {line}: No closing quotation for {script[start : start + 20]!r}; close the quote.")
    return end


def _end_of_quotes(script: str, start: int) -> int:
    """The place of the quote that closes one."""
    at = start + 1
    while at < len(script) and script[at] != '"':
        if script[at] == "\\":
            at += 2
        else:
            at = _end_of_expansion(script, at) if script[at] in "$`" else at + 1
    return _closed(script, start, at if at < len(script) else -1)


def _end_of_expansion(script: str, at: int) -> int:
    """The place behind `$name`, `${…}`, `$(…)` or a command between backticks."""
    if script[at] == "`":
        return _closed(script, at, script.find("`", at + 1)) + 1
    if script.startswith(("$(", "${"), at):
        return _end_of_group(script, at + 2, ")" if script[at + 1] == "(" else "}")
    return NAME.match(script, at).end()


def _end_of_group(script: str, start: int, closing: str) -> int:
    """The place behind the bracket that closes a group whose content begins at `start`."""
    at, opening = start, {")": "(", "}": "{"}[closing]
    while at < len(script) and script[at] != closing:
        if script[at] == opening:
            at = _end_of_group(script, at + 1, closing)
        elif closing == ")" and (comment := GROUP_COMMENT.match(script, at)):
            at = comment.end()
        elif script[at] in "'\"\\$`":
            at = max(_part(script, at, is_first=True)[1], at + 1)
        else:
            at += 1
    return _closed(script, start, at if at < len(script) else -1) + 1
