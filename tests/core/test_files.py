"""Files are written whole, also where folders cannot be opened."""

import os

from diffsynth.core import files


def test_windows_where_no_folder_can_be_opened_gets_its_files_synced(tmp_path, monkeypatch):
    opened, system_open = [], os.open

    def as_windows_does(path, flags):
        if os.path.isdir(path):
            raise PermissionError(path)
        opened.append(flags & os.O_ACCMODE)
        return system_open(path, flags)

    monkeypatch.setattr(files, "ON_WINDOWS", True)
    monkeypatch.setattr(files.os, "open", as_windows_does)
    files.write_text(tmp_path / "a.txt", "whole")
    with files.replacing_folder(tmp_path / "folder") as partial:
        (partial / "b.txt").write_text("whole")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "folder" / "b.txt").read_text() == "whole"
    assert opened == [os.O_RDWR] * 2  # it does not sync what is open for reading only
