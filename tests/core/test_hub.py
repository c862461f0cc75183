"""The lock under which files of a folder are downloaded."""

import os
import stat

import pytest

from diffsynth.core import hub


@pytest.mark.parametrize("writable, expected", [(True, ".model.lock"), (False, "model/.lock")])
def test_the_lock_lies_where_something_can_be_written_and_is_for_all_users(writable, expected, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    before = os.umask(0o077)
    try:
        with hub.locked(tmp_path / "model"):
            pass
        with hub.locked(tmp_path / "model"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / expected).stat().st_mode) == 0o666
