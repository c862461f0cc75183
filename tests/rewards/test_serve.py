"""The server of a scorer, as a process and by its format."""

import json
import subprocess
import sys
import threading
from base64 import b64encode
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from diffsynth.rewards.serve import Server, load, main

SCORER = """
def red(images, prompts, rows):
    return [image.getpixel((0, 0))[0] * row["factor"] for image, row in zip(images, rows)]
"""


def request(colour="red", prompt="a", row=None) -> dict:
    file = BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return {"prompt": prompt, "image": b64encode(file.getvalue()).decode(), "row": row or {}}


@pytest.fixture
def post():
    """`post(scorer, body)`: the status and the answer of a server of this scorer."""
    servers = []

    def ask(scorer, body) -> tuple[int, dict]:
        servers.append(server := Server(scorer, "v1", port=0))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urlopen(Request(f"http://127.0.0.1:{server.server_port}/score", data), timeout=20) as response:
                return response.status, json.loads(response.read())
        except HTTPError as error:
            return error.code, json.loads(error.read())

    yield ask
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_function_is_served_by_one_command_without_torch(tmp_path):
    (tmp_path / "scorer.py").write_text(SCORER)
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'serve'; "
    code += "runpy.run_module('diffsynth.rewards.serve', run_name='__main__')"
    command = [sys.executable, "-c", code, "scorer:red", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = line.split()[-1]
        with urlopen(f"{url}/health", timeout=20) as response:
            version = json.loads(response.read())["version"]
        body = json.dumps({"requests": [request(row={"factor": 2}), request("black", row={"factor": 2})]}).encode()
        with urlopen(Request(f"{url}/score", body), timeout=20) as response:
            assert json.loads(response.read()) == {"version": version, "scores": [510, 0], "errors": [None, None]}
        assert version in line
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", ["absent:red", "json:absent", "json", ":red"])
def test_a_scorer_that_is_absent_is_named(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve", name])
    with pytest.raises(SystemExit):
        main()
    assert f"{name} is no function of a module in this folder" in capsys.readouterr().err


def test_a_version_is_that_of_the_scorers_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for name in ("one", "same", "other"):
        (tmp_path / f"{name}_scorer.py").write_text(SCORER.replace("* row", "+ row") if name == "other" else SCORER)
        versions.append(load(f"{name}_scorer:red")[1])
    assert versions[0] == versions[1] != versions[2]


def test_a_score_that_is_none_nan_or_a_reason_is_null(post):
    status, answer = post(lambda *_: [1.5, None, float("nan"), "no face"], {"requests": [request()] * 4})
    assert status == 200 and answer["scores"] == [1.5, None, None, None]
    assert answer["errors"] == [None, None, None, "no face"]


def test_a_scorer_that_fails_or_miscounts_is_answered_with_its_error(post, capfd):
    def broken(images, prompts, rows):
        raise RuntimeError("out of memory")

    assert post(broken, {"requests": [request()]}) == (
        500,
        {"error": "the scorer failed: RuntimeError('out of memory')"},
    )
    assert "Traceback" in capfd.readouterr().err
    status, answer = post(lambda *_: [1, 2], {"requests": [request()]})
    assert status == 500 and "it returned 2 scores of 1 pictures" in answer["error"]


@pytest.mark.parametrize(
    "body",
    [b"nonsense", b"[]", {"requests": [{}]}, {"requests": [{**request(), "image": "x"}]}, {"requests": 1}],
    ids=["text", "list", "empty", "image", "number"],
)
def test_a_request_that_is_none_is_refused(body, post):
    status, answer = post(lambda *_: [1], body)
    assert status == 400 and "no request that this server reads" in answer["error"]
