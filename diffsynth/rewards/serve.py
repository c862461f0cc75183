"""Serve a scorer to the reward `http`, in its own environment, which needs Pillow and nothing else of ours.

    python -m diffsynth.rewards.serve module:function --port 8000

`function(images, prompts, rows)` gets lists of equal length: RGB pictures of Pillow, texts, and the other columns of
the prompts' table as dicts. It returns a number for each picture; for one that it cannot score, None or a text that
says why.

GET /health answers {"version": text}. POST /score takes {"requests": [{"prompt": text, "image": base64 of a PNG, "row":
{…}}]} and answers {"version": text, "scores": [number or null], "errors": [text or null]}. A request that fails as a
whole is answered with {"error": text} and the status 400 or 500.
"""

import argparse
import json
import math
import traceback
from base64 import b64decode
from collections.abc import Callable, Sequence
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from io import BytesIO
from pathlib import Path
from threading import Lock

from PIL import Image


class Server(ThreadingHTTPServer):
    """A server of one scorer, which scores one request at a time.

    Args:
        scorer: `function(images, prompts, rows)`.
        version: What the scores depend on; clients stop if it changes.
        host, port: Address to listen at; the port 0 takes a free one.
    """

    def __init__(self, scorer: Callable, version: str, host: str = "127.0.0.1", port: int = 8000):
        super().__init__((host, port), Handler)
        self.scorer, self.version, self.lock = scorer, version, Lock()

    def answer(self, images: Sequence[Image.Image], prompts: Sequence[str], rows: Sequence[dict]) -> dict:
        """The scores of pictures, and the reasons why some have none."""
        with self.lock:
            found = list(self.scorer(images, prompts, rows))
        if len(found) != len(images):
            raise ValueError(f"it returned {len(found)} scores of {len(images)} pictures")
        errors = [score if isinstance(score, str) else None for score in found]
        return {"version": self.version, "scores": list(map(_finite, found)), "errors": errors}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        known = self.path == "/health"
        self._answer(200 if known else 404, {"version": self.server.version} if known else {"error": "no such path"})

    def do_POST(self) -> None:
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            columns = zip(*map(_read, body["requests"]), strict=True)
            images, prompts, rows = map(list, columns)
        except (ValueError, KeyError, TypeError, OSError) as error:
            self._answer(400, {"error": f"no request that this server reads: {error!r}"})
            return
        try:
            answer = self.server.answer(images, prompts, rows)
        except Exception as error:  # whatever the scorer raises
            traceback.print_exc()
            self._answer(500, {"error": f"the scorer failed: {error!r}"})
            return
        self._answer(200, answer)

    def _answer(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Requests are not logged."""


def _read(request: dict) -> tuple[Image.Image, str, dict]:
    image = Image.open(BytesIO(b64decode(request["image"], validate=True)))
    return image.convert("RGB"), request["prompt"], request["row"]


def _finite(score: float | str | None) -> float | None:
    """A score; None for one that is not finite, because JSON has none, and for a reason."""
    return None if score is None or isinstance(score, str) or not math.isfinite(score) else float(score)


def load(name: str) -> tuple[Callable, str]:
    """The function of `module:function`, and a digest of the module's file, which changes with it."""
    module_name, _, function = name.partition(":")
    module = import_module(module_name)
    return getattr(module, function), blake2b(Path(module.__file__).read_bytes(), digest_size=8).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorer", help="module:function")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 serves other machines, too")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one")
    parser.add_argument("--version", help="what the scores depend on, such as weights; a digest of the module's file")
    given = parser.parse_args()
    try:
        scorer, digest = load(given.scorer)
    except (ImportError, AttributeError, ValueError) as error:
        parser.error(f"{given.scorer} is no function of a module in this folder: {error}; expected module:function")
    server = Server(scorer, given.version or digest, given.host, given.port)
    print(f"serving version {server.version} at http://{given.host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
