"""Scores from a server: every fault of it has its own clear end, and no batch that succeeded is scored again."""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from diffsynth.diffusion.rewards import HttpReward
from diffsynth.rewards.serve import Server

CPU = torch.device("cpu")
PICTURES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in range(5)]


def red(images, prompts, rows) -> list[float]:
    return [image.getpixel((3, 3))[0] for image in images]


def score(reward: HttpReward, count: int = 5) -> list[float]:
    return reward.score(
        PICTURES[:count], [f"prompt {n}" for n in range(count)], [{"n": n} for n in range(count)], CPU
    ).tolist()


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(*answers: object | Callable) -> Iterator[tuple[str, list]]:
    """A server of version v1 that answers each POST in turn, the last for ever; yields its URL and the requests.

    An answer is a value that is sent as JSON, bytes, a status, or a function of the handler.
    """
    asked, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"version": "v1"})

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = left.pop(0) if len(left) > 1 else left[0]
            answer(self) if callable(answer) else self.send(answer)

        def send(self, answer):
            status = answer if isinstance(answer, int) else 200
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, asked


def ok(*scores: float | None, **others: object) -> dict:
    return {"version": "v1", "scores": list(scores), **others}


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The seconds that were waited between tries; nothing waits."""
    waited = []
    monkeypatch.setattr("diffsynth.diffusion.rewards.server.time.sleep", waited.append)
    return waited


def test_a_served_function_scores_every_picture_with_its_prompt_and_row(waits):
    seen = []

    def scorer(images, prompts, rows):
        seen.append((prompts, rows))
        return red(images, prompts, rows)

    with running(Server(scorer, "v7", port=0)) as url:
        reward = HttpReward(url + "/", batch_size=2)
        reward.find()
        assert score(reward) == [0, 1, 2, 3, 4] and reward.version == "HttpReward v7"
    assert [prompts for prompts, _ in seen] == [["prompt 0", "prompt 1"], ["prompt 2", "prompt 3"], ["prompt 4"]]
    assert seen[1][1] == [{"n": 2}, {"n": 3}] and waits == []


def test_what_cannot_be_scored_is_nan_and_its_reason_is_logged(caplog):
    answer = b'{"version": "v1", "scores": [1, null, NaN], "errors": [null, "no face", null]}'
    with answering(answer) as (url, _), caplog.at_level(logging.WARNING):
        found = score(HttpReward(url), 3)
    assert found[0] == 1 and math.isnan(found[1]) and math.isnan(found[2])
    assert "could not score 2 of 3 pictures: no face" in caplog.text


def test_a_fault_that_passes_costs_a_wait_and_only_its_own_batch_is_asked_again(waits):
    with answering(ok(1, 2), 503, 429, ok(3, 4), ok(5)) as (url, asked):
        assert score(HttpReward(url, batch_size=2)) == [1, 2, 3, 4, 5]
    prompts = [[request["prompt"] for request in body["requests"]] for body in asked]
    first, second, third = ["prompt 0", "prompt 1"], ["prompt 2", "prompt 3"], ["prompt 4"]
    assert prompts == [first, second, second, second, third] and waits == [1, 2]


def test_an_answer_that_breaks_off_is_asked_for_again():
    def broken(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"version": "v1"')
        handler.close_connection = True

    with answering(broken, ok(1)) as (url, asked):
        assert score(HttpReward(url), 1) == [1] and len(asked) == 2


def test_a_server_that_is_always_too_slow_ends_the_run_with_what_to_change():
    def slow(handler):
        threading.Event().wait(1)

    with answering(slow) as (url, asked), pytest.raises(ConnectionError, match="2 tries of 0.2 s.*timed out.*timeout"):
        score(HttpReward(url, timeout=0.2, retries=1))
    assert len(asked) == 2


def test_a_server_that_sends_a_byte_now_and_then_is_too_slow_as_well():
    def dribble(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            threading.Event().wait(0.05)

    with answering(dribble) as (url, _), pytest.raises(ConnectionError, match="the answer takes too long"):
        score(HttpReward(url, timeout=0.3, retries=0))


def test_a_server_that_dies_in_the_middle_ends_the_run_after_its_retries(waits):
    with running(Server(red, "v1", port=0)) as url:
        reward = HttpReward(url, batch_size=2, timeout=5, retries=3)
        assert score(reward, 2) == [0, 1]
    with pytest.raises(ConnectionError, match="gave no answer in 4 tries.*refused.*start the server"):
        score(reward)
    assert waits == [1, 2, 4]


def test_a_server_that_is_absent_is_found_out_at_first():
    with pytest.raises(OSError, match="gave no answer in 1 tries"):
        HttpReward("http://127.0.0.1:9", retries=0).find()


def test_another_version_ends_the_run():
    said = "has version 'v2' now, and had 'v1' when the run began"
    changed = {"version": "v2", "scores": [3, 4]}
    with answering(ok(1, 2), changed) as (url, asked), pytest.raises(ValueError, match=said):
        score(HttpReward(url, batch_size=2), 4)
    assert len(asked) == 2


def test_a_scorer_that_fails_is_tried_again_and_its_error_is_shown():
    def broken(*_):
        raise RuntimeError("out of memory")

    with (
        running(Server(broken, "v1", port=0)) as url,
        pytest.raises(ConnectionError, match="status 500.*out of memory"),
    ):
        score(HttpReward(url, retries=1))


@pytest.mark.parametrize(
    "answer, said",
    [
        (ok(1), r"answers \[1\]; expected a list of 2 scores"),
        (ok(1, 2, 3), r"answers \[1, 2, 3\]; expected a list of 2 scores"),
        ({"version": "v1", "scores": {"0": 1}}, "expected a list of 2 scores"),
        ({"version": "v1", "error": "no"}, "answers None; expected a list of 2 scores"),
        (ok(1, "2"), "answers '2' as a score; expected a number, or null"),
        (ok(1, True), "answers True as a score"),
        (ok(1, [2]), r"answers \[2\] as a score"),
        ({"scores": [1, 2]}, "expected a text as its version"),
        ([1, 2], r"answers '\[1, 2\]'; expected a JSON object"),
        (b"\x80\x04K\x01.", "expected a JSON object: is it another server"),
        (b"<html>", "answers '<html>'; expected a JSON object"),
        (400, "refuses the request with status 400"),
        (404, "refuses the request with status 404"),
    ],
)
def test_nonsense_is_refused_by_name_without_a_second_try(answer, said, waits):
    with answering(answer) as (url, asked), pytest.raises(ValueError, match=said) as refused:
        score(HttpReward(url), 2)
    assert url in str(refused.value) and len(asked) == 1 and waits == []


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"url": "localhost:8000"}, "reward.url is 'localhost:8000'; expected an address such as http://"),
        ({"url": "http://x", "timeout": 0}, "reward.timeout is 0; expected a number above 0"),
        ({"url": "http://x", "retries": -1}, "reward.retries is -1"),
        ({"url": "http://x", "batch_size": 0}, "reward.batch_size is 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        HttpReward(**wrong)
