"""Damage to files: bytes flipped, cut, repeated, and pieces of text that readers have stumbled over."""

from collections.abc import Sequence
from functools import reduce

from hypothesis import strategies as st

# What a file may hold that its reader does not expect. `SECRET` lies beside the folder that readers may look into.
SECRET = "secret.png"
PIECES = [
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b'"',
    b",",
    b"\n",
    b"null",
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"[" * 2000,
    b'{"a":' * 500,
    b"../" + SECRET.encode(),
    b"/etc/passwd",
    b"http://127.0.0.1:9/a.png",
    b"file:///etc/passwd",
    "猫".encode(),
    b"%s%n",
    b"(a+)+$",
]

places = st.floats(0, 1)
edits = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), places, st.integers(0, 7)),
        st.tuples(st.just("insert"), places, st.sampled_from(PIECES) | st.binary(max_size=8)),
        st.tuples(st.just("overwrite"), places, st.sampled_from(PIECES) | st.binary(max_size=8)),
        st.tuples(st.just("cut"), places, st.integers(1, 64)),
        st.tuples(st.just("repeat"), places, st.integers(1, 64)),
        st.tuples(st.just("end"), places, st.none()),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, edits: Sequence[tuple]) -> bytes:
    """The content after all edits, one after the other."""
    return reduce(_edited, edits, content)


def _edited(content: bytes, edit: tuple) -> bytes:
    kind, place, value = edit
    at = min(int(place * len(content)), max(len(content) - 1, 0))
    if kind == "flip":
        return content[:at] + bytes(byte ^ 1 << value for byte in content[at : at + 1]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + value + content[at:]
    if kind == "overwrite":
        return content[:at] + value + content[at + len(value) :]
    if kind == "cut":
        return content[:at] + content[at + value :]
    if kind == "repeat":
        return content[:at] + content[at : at + value] * 2 + content[at + value :]
    return content[:at]
