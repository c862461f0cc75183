"""A hub of one repository on localhost: the few endpoints that both clients call to download a snapshot of it."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

COMMIT = "0" * 40


@contextmanager
def serve(repository: Path, model_id: str):
    """Serve a folder as `model_id`; yields the endpoint and the list of files that were fetched."""
    fetched = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if url.path == f"/api/models/{model_id}/revision/main":
                self.answer({"id": model_id, "sha": COMMIT})
            elif url.path in {f"/api/models/{model_id}/tree/{revision}" for revision in ("main", COMMIT)}:
                self.answer([{"type": "file", "path": f, "size": s, "oid": h} for f, s, h in files()])
            elif url.path.startswith(f"/{model_id}/resolve/"):
                self.send(url.path.removeprefix(f"/{model_id}/resolve/{COMMIT}/"))
            elif url.path in (f"/api/v1/models/{model_id}/repo/files", f"/api/v1/datasets/{model_id}/repo/tree"):
                within = [row for row in files() if row[0].startswith(query.get("Root", ""))]
                listed = [{"Path": f, "Type": "blob", "Size": s, "Sha256": h} for f, s, h in within]
                self.answer({"Code": 200, "Data": {"Files": listed}})
            elif url.path in (f"/api/v1/models/{model_id}/repo", f"/api/v1/datasets/{model_id}/repo"):
                self.send(query["FilePath"])
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, data):
            self.body(json.dumps(data).encode(), "application/json")

        def send(self, name):
            if self.command == "GET":
                fetched.append(name)
            self.body((repository / name).read_bytes(), "application/octet-stream")

        def body(self, content, kind):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    def files():
        for file in sorted(path for path in repository.rglob("*") if path.is_file()):
            content = file.read_bytes()
            yield file.relative_to(repository).as_posix(), len(content), hashlib.sha256(content).hexdigest()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
