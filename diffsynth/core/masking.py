"""Mask credentials in URLs, and folders in paths, in what others may read: run folders, exports, trackers, logs.

A part that is an interpolation (`${oc.env:TOKEN}`) holds no secret and stays as it is.
"""

import re
from collections.abc import Callable
from typing import Any

MASK = "***"
END = r"\s'\"<>\\"  # characters that end a URL in a text, in JSON and in YAML
# Where a user alone may be a token. Elsewhere it is none without a password: `abfss://` has the container there.
OF_TOKENS = "|".join(f"(?<={scheme}://)" for scheme in ("http", "https", "ftp", "ssh"))
USER = re.compile(rf"(?:{OF_TOKENS})[^{END}/?#]+(?=@)|(?<=://)[^{END}/?#:@]*:[^{END}/?#]+(?=@)", re.IGNORECASE)
# Query parameters that are or hold secrets: of S3, Google and CloudFront (signed URLs), Azure (`sig`), and of APIs.
# A word ends at a separator, so that `tokenizer`, `max_tokens` and `author` are none.
SECRET_WORDS = (
    "token|secret|passw(?:or)?d|passphrase|signature|credentials?|auth|authorization|"
    "api[-_]?key|access[-_]?key(?:[-_]?id)?|access[-_]?id|key[-_]?pair[-_]?id|key[-_]?id"
)
SECRET_NAME = rf"[\w.-]{{0,40}}(?:{SECRET_WORDS})(?=[=._-])[\w.-]{{0,40}}|x-(?:amz|goog)-[\w-]+|sig|pwd"
LONG = rf"(?:key|policy)(?==[^{END}&#]{{16}})"  # these names also have harmless values; a guess: keys are no shorter
QUERY = re.compile(rf"(?<=[?&;])({SECRET_NAME}|{LONG})=([^{END}&#]+)", re.IGNORECASE)
MASKED = re.compile(rf"://{re.escape(MASK)}@|[?&;][\w.-]+={re.escape(MASK)}")
ABSOLUTE = re.compile(r"(?:file:/)?/|~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|\.\.[\\/]")
FOLDERS = re.compile(rf"(?<![\w.~$}}:/\\*-])(?:~?/|[A-Za-z]:[\\/])(?:[^{END}/,;:]+[\\/]+)+")


def masked(text: str) -> str:
    """A text in which the user information and the secret query parameters of URLs are replaced by `***`."""
    text = USER.sub(lambda user: user[0] if "${" in user[0] else MASK, text)
    return QUERY.sub(lambda part: part[0] if "${" in part[2] else f"{part[1]}={MASK}", text)


def is_masked(text: str) -> bool:
    """Whether a text holds a URL of which `masked` has replaced a part."""
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
