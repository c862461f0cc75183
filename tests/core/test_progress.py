"""What is seen of a run while it goes on: a bar on a terminal, lines elsewhere."""

import pytest

from diffsynth.core import progress
from diffsynth.core.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_there_is_a_line_every_half_minute_with_the_time_left(clock, capsys):
    bar = ProgressBar(steps=10)
    bar.show({"loss": 0.12345})
    for step in range(1, 6):
        clock[0] += 20
        bar.advance(step)
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 3/10, 02:20 left, loss=0.123",
        "step 5/10, 01:40 left, loss=0.123",
    ]


def test_what_is_kept_has_a_line_of_its_own(clock, capsys):
    bar = ProgressBar(steps=2)
    bar.show({"held_out_loss": 3.0})
    bar.keep()
    bar.advance(1)
    assert capsys.readouterr().err == "step 0/2, held_out_loss=3\n"


def test_only_the_process_that_is_to_shows_anything(clock, capsys):
    bar = ProgressBar(steps=2, visible=False)
    bar.show({"loss": 1.0})
    bar.keep()
    clock[0] += 100
    bar.advance(1)
    bar.advance(2)
    assert capsys.readouterr().err == ""
