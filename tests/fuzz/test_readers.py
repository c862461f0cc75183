"""No reader hangs, fails with an error that is not the project's, or leaves its folder, whatever a file holds.

`make fuzz` tries for ten minutes what the suite tries for seconds.
"""

import os
import signal
import time
from pathlib import Path

import pytest
from damage import SECRET, damaged, edits
from hypothesis import given, settings
from readers import READERS, Reader, picture
from watch import watched

EXAMPLES = int(os.environ.get("FUZZ", 10))
OURS = (ValueError, OSError)  # these errors end a command in one line: `config.explained`
SECONDS = 1.0  # most time of this process that a damaged file may take
HANGS_AFTER = 60  # seconds on the clock; other processes take time as well


@pytest.fixture(scope="module", params=READERS)
def sound(request, tmp_path_factory) -> tuple[Reader, Path]:
    """A reader, and a folder that it reads; the first time is left out, because it imports libraries."""
    around = tmp_path_factory.mktemp("around")
    picture("png")(around)
    (around / "a.png").rename(around / SECRET)
    reader, folder = READERS[request.param], around / "folder"
    folder.mkdir()
    reader.make(folder)
    reader.read(folder)
    return reader, folder


@settings(max_examples=EXAMPLES)
@given(edits=edits)
def test_a_damaged_file_is_read_or_refused_at_once_and_nothing_else_is_touched(sound, edits):
    reader, folder = sound
    path = folder / reader.name
    content = path.read_bytes()
    path.write_bytes(damaged(content, edits))
    try:
        seconds = read(reader, folder)
        assert seconds < SECONDS or read(reader, folder) < SECONDS  # the first error of a kind may import a library
    finally:
        path.write_bytes(content)


def read(reader: Reader, folder: Path) -> float:
    """Read a folder that may be damaged, and return the process's time that it took."""
    signal.signal(signal.SIGALRM, _give_up)
    signal.alarm(HANGS_AFTER)
    began = time.process_time()
    try:
        with watched(folder, *reader.readable()) as offences:
            reader.read(folder)
    except OURS as error:
        assert Path(reader.name).name in str(error) or str(folder) in str(error), error
    finally:
        signal.alarm(0)
    assert offences == []
    return time.process_time() - began


def _give_up(*_) -> None:
    raise TimeoutError("the reader hangs")


def test_the_watch_sees_what_it_is_for(tmp_path):
    """Otherwise the statements above would hold of anything."""
    outside = tmp_path / "outside.txt"
    outside.write_text("")
    (tmp_path / "readable").mkdir()
    (tmp_path / "readable" / "file").write_text("")
    (tmp_path / "inside").mkdir()
    with watched(tmp_path / "inside", tmp_path / "readable") as offences:
        outside.read_text()
        (tmp_path / "readable" / "file").read_text()
        (tmp_path / "readable" / "file").write_text("")
        (tmp_path / "inside" / "file").write_text("")
        outside.unlink()
    assert [offence.split()[0] for offence in offences] == ["open", "open", "os.remove"]
