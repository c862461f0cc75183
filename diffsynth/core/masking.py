"""Mask credentials in URLs, and folders in paths, in what others may read: run folders, exports, trackers, logs.

A part that is an interpolation (`${oc.env:TOKEN}`) holds no secret and stays as it is.
"""

import re
from collections.abc import Callable
from typing import Any

MASK = "***"
END = r"\s<>"  # characters that end a URL
END_IN_TEXT = END + r"'\"\\"  # in a text, JSON or YAML, where a quote or an escape may follow
SLASHES = r"(?:(?<=://)|(?<=:\\/\\/))"  # the second as some programs write JSON
# Where a user alone may be a token. Elsewhere it is none without a password: `abfss://` has the container there.
OF_TOKENS = "|".join(
    f"(?<={scheme}:{slashes})" for scheme in ("http", "https", "ftp", "ssh") for slashes in ("//", r"\\/\\/")
)
# Query parameters that are or hold secrets: of S3, Google and CloudFront (signed URLs), Azure (`sig`), and of APIs.
# A word ends at a separator, so that `tokenizer`, `max_tokens` and `author` are none.
SECRET_WORDS = (
    "token|secret|passw(?:or)?d|passphrase|signature|credentials?|auth|authorization|"
    "api[-_]?key|access[-_]?key(?:[-_]?id)?|access[-_]?id|key[-_]?pair[-_]?id|key[-_]?id"
)
SECRET_NAME = (
    rf"[\w.-]{{0,40}}(?:{SECRET_WORDS})(?=[=._[%-])[\w.-]{{0,40}}|x-(?:amz|goog)-[\w-]+|"
    "sig|pwd|pass|jwt|bearer|sas|hmac|otp"
)
BRACKETS = r"(?:\[\]|%5B%5D)?"  # of a parameter that is a list
# These names also have harmless values; a guess: secrets are no shorter.
LONG = "key|policy|code|session"
MASKED = re.compile(
    rf":(?://|\\/\\/)[^\s/?#]*{re.escape(MASK)}@|[?&;#][\w.-]+{BRACKETS}=[^\s?&;#]*{re.escape(MASK)}", re.IGNORECASE
)
INTERPOLATION = re.compile(r"(\$\{(?:[^{}]|\{[^{}]*\})*(?:\}|$))")  # with others in it; a space in it ends the URL
ABSOLUTE = re.compile(r"(?:file:/)?/|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|\.\.[\\/]")
FOLDERS = re.compile(rf"(?<![\w.~$}}:/\\*-])(?:~?/|[A-Za-z]:[\\/])(?:[^{END}/,;:]+[\\/]+)+")


def _user(end: str) -> re.Pattern:
    """The pattern of the user information of a URL."""
    return re.compile(rf"(?:{OF_TOKENS})[^{end}/?#]+(?=@)|{SLASHES}[^{end}/?#:@]*:[^{end}/?#]+(?=@)", re.IGNORECASE)


def _query(end: str) -> re.Pattern:
    """The pattern of a secret query parameter: its name and its value."""
    long = rf"(?:{LONG})(?={BRACKETS}=[^{end}&#]{{16}})"
    return re.compile(rf"(?<=[?&;#])((?:{SECRET_NAME}|{long}){BRACKETS})=([^{end}&#]+)", re.IGNORECASE)


IN_VALUES = _user(END), _query(END)
IN_TEXTS = _user(END_IN_TEXT), _query(END_IN_TEXT)


def masked(text: str) -> str:
    """A text in which the user information and the secret query parameters of URLs are replaced by `***`.

    A quote or a backslash ends a URL in it; `masked_values` is for what is no text around URLs.
    """
    return _masked(text, *IN_TEXTS)


def masked_values(value: Any) -> Any:
    """Nested dicts and lists of which every string is masked like a text, but with quotes and backslashes in URLs.

    They are to be masked before they become JSON or YAML, whose escapes would end a URL.
    """
    return in_strings(lambda text: _masked(text, *IN_VALUES), value)


def _masked(text: str, user: re.Pattern, query: re.Pattern) -> str:
    text = user.sub(lambda found: _masked_user(found[0]), text)
    return query.sub(lambda found: f"{found[1]}={_masked_value(found[2])}", text)


def _masked_user(information: str) -> str:
    """Mask `user:password` as a whole, but beside an interpolation only the password, or a token without a name."""
    parts = INTERPOLATION.split(information)
    if len(parts) == 1:
        return MASK
    place = next((place for place, part in enumerate(parts[::2]) if ":" in part), None)
    if place is None:
        return _masked_value(information)
    name, _, password = parts[2 * place].partition(":")
    return "".join(parts[: 2 * place]) + name + ":" + _masked_value("".join([password, *parts[2 * place + 1 :]]))


def _masked_value(value: str) -> str:
    """Mask all but interpolations, and quotes and brackets at the end, which may be those around the URL."""
    secret = value.rstrip("'\"])")
    parts = INTERPOLATION.split(secret)
    shown = "".join(part if place % 2 else MASK * bool(part) for place, part in enumerate(parts))
    return shown + value[len(secret) :]


def is_masked(text: str) -> bool:
    """Whether a text holds a URL of which a part has been masked."""
    return MASKED.search(text) is not None


def without_folders(text: str) -> str:
    """A text in which absolute paths are shortened to `***/<name>`, as folders tell who made a file and where."""
    if ABSOLUTE.match(text):
        name = re.split(r"[\\/]", text.rstrip("/\\"))[-1]
        return f"{MASK}/{name}"
    return FOLDERS.sub(f"{MASK}/", text)


def in_strings(change: Callable[[str], str], value: Any) -> Any:
    """Nested dicts and lists with `change` applied to every string that is a value."""
    if isinstance(value, dict):
        return {name: in_strings(change, element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [in_strings(change, element) for element in value]
    return change(value) if isinstance(value, str) else value
