"""A judge that is asked over an API like OpenAI's: its question, its scores, what is kept, and its faults."""

import json
import logging
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
import torch
from PIL import Image

from diffsynth.diffusion.rewards import Judge

CPU = torch.device("cpu")
PICTURES = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in range(4)]
RUBRIC = "conf/reward/judge_rubric.txt"


@pytest.fixture
def api():
    """`api(answers)`: the URL of a server that answers a question about the picture n by `answers[n]`, and its log."""
    servers = []

    def start(answers: list[str] | object) -> tuple[str, list]:
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send({"data": []})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, self.headers["Authorization"], body))
                image = body["messages"][0]["content"][1]["image_url"]["url"].removeprefix("data:image/png;base64,")
                number = Image.open(BytesIO(b64decode(image))).getpixel((0, 0))[0]
                known = isinstance(answers, list)
                self.send({"choices": [{"message": {"content": answers[number]}}]} if known else answers)

            def send(self, answer):
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def score(judge: Judge, count: int = 4) -> torch.Tensor:
    return judge.score(PICTURES[:count], [f"a cat {n}" for n in range(count)], [{}] * count, CPU)


def close(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected).float(), equal_nan=True)


def test_scores_follow_their_pictures_and_answers_without_one_are_nan(api, tmp_path, caplog):
    answers = ["Good.\nFinal Score: 4", "**Final Score:** 2.5", "I cannot say.", "Final Score: 50"]
    url, asked = api(answers)
    judge = Judge(url, "vlm", RUBRIC, str(tmp_path / "kept"))
    judge.find()
    with caplog.at_level(logging.WARNING):
        close(score(judge), [4, 2.5, float("nan"), float("nan")])
    assert "vlm gave 2 of 4 answers without a score: 'I cannot say.'" in caplog.text
    path, key, body = asked[0]
    assert (path, key, body["temperature"], body["model"]) == ("/v1/chat/completions", None, 0, "vlm")
    assert "a cat " in body["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Final Score: 3", 3),
        ("final score: 3/5", 3),
        ("Final Score: 1\nNo, that was too strict.\nFinal Score: 2", 2),
        ("Final Score: -1", None),
        ("Final Score: x", None),
        ("Score: 3", None),
        ("", None),
    ],
)
def test_the_last_score_in_range_counts(answer, score, tmp_path):
    assert Judge("http://x", "vlm", RUBRIC, str(tmp_path)).score_in(answer) == score


def test_no_picture_is_judged_twice_for_a_prompt(api, tmp_path):
    url, asked = api(["Final Score: 1", "Final Score: 2", "?", "Final Score: 4"])
    kept = str(tmp_path / "kept")
    first = score(Judge(url, "vlm", RUBRIC, kept), 3)
    close(score(Judge(url, "vlm", RUBRIC, kept)), [*first.tolist(), 4])
    assert len(asked) == 4
    score(Judge(url, "other", RUBRIC, kept), 1)
    Judge(url, "vlm", RUBRIC, kept).score(PICTURES[:1], ["another prompt"], [{}], CPU)
    assert len(asked) == 6


def test_a_damaged_answer_on_disk_is_asked_for_again(api, tmp_path):
    url, asked = api(["Final Score: 1"])
    judge = Judge(url, "vlm", RUBRIC, str(tmp_path / "kept"))
    score(judge, 1)
    (file,) = (tmp_path / "kept").rglob("*.json")
    file.write_text('{"answer"')
    close(score(judge, 1), [1])
    assert len(asked) == 2 and json.loads(file.read_text())["answer"] == "Final Score: 1"


def test_the_key_comes_from_the_environment(api, tmp_path, monkeypatch):
    url, asked = api(["Final Score: 1"])
    monkeypatch.setenv("JUDGE_KEY", "secret")
    score(Judge(url, "vlm", RUBRIC, str(tmp_path), key_variable="JUDGE_KEY"), 1)
    assert asked[0][1] == "Bearer secret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="reward.key_variable is JUDGE_KEY, which the environment does not have"):
        Judge(url, "vlm", RUBRIC, str(tmp_path), key_variable="JUDGE_KEY")


@pytest.mark.parametrize("answer", [{"choices": []}, {"error": "no"}, {"choices": [{"message": {"content": None}}]}])
def test_what_is_no_chat_completion_is_refused(answer, api, tmp_path):
    url, _ = api(answer)
    with pytest.raises(ValueError, match="expected a chat completion with a text"):
        score(Judge(url, "vlm", RUBRIC, str(tmp_path)), 1)
    assert not list(tmp_path.rglob("*.json"))


def test_a_server_that_is_absent_ends_the_run(tmp_path):
    judge = Judge("http://127.0.0.1:9/v1", "vlm", RUBRIC, str(tmp_path), retries=0)
    for ask in (judge.find, lambda: score(judge)):
        with pytest.raises(OSError, match="gave no answer in 1 tries"):
            ask()


def test_a_rubric_needs_the_prompt_and_the_line_of_the_score(tmp_path):
    (tmp_path / "rubric.txt").write_text("Judge {prompt}.")
    with pytest.raises(ValueError, match="rubric.txt has no 'Final Score:'"):
        Judge("http://x", "vlm", str(tmp_path / "rubric.txt"), str(tmp_path)).find()
    with pytest.raises(ValueError, match="reward.lowest is 5 and highest is 1"):
        Judge("http://x", "vlm", RUBRIC, str(tmp_path), lowest=5, highest=1)


def test_the_version_changes_with_the_rubric(tmp_path):
    (tmp_path / "rubric.txt").write_text("Judge {prompt}.\nFinal Score: x")
    versions = [
        Judge("http://x", "vlm", str(file), "kept").version for file in (RUBRIC, tmp_path / "rubric.txt", RUBRIC)
    ]
    assert versions[0] == versions[2] != versions[1]
