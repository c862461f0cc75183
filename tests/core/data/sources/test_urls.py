"""Files that rows name by URLs, from a server on localhost: where they may lead, and how much they may take."""

import json
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image

from diffsynth.core.data import LoadImage, UnifiedDataset
from diffsynth.core.data.sources import urls
from diffsynth.core.data.sources.urls import is_public, read_url


def picture() -> bytes:
    file = BytesIO()
    Image.new("RGB", (32, 16), "red").save(file, "png")
    return file.getvalue()


class Server(BaseHTTPRequestHandler):
    """Answers `/a.png`, `/page`, redirects, and what would never end; lists the paths that it was asked for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        port = self.server.server_port
        match self.path.split("?")[0]:
            case "/busy.png" if len(self.server.asked) < 3:
                self.send_error(503)
            case "/a.png" | "/busy.png":
                self.answer(picture())
            case "/page":
                self.answer(b"<!DOCTYPE html>")
            case "/moved":
                self.redirect("/a.png")
            case "/round":
                self.redirect("/round")
            case "/ftp":
                self.redirect(f"ftp://127.0.0.1:{port}/a.png")
            case "/file":
                self.redirect("file:///etc/hostname")
            case "/inside":
                self.redirect(f"http://127.0.0.2:{port}/a.png")
            case "/short":
                self.answer(b"short", length=9)
            case "/endless":
                self.answer(b"x" * 1000, ends=False)
            case "/slow":
                self.answer(b"x", ends=False, wait=0.05)
            case "/slow_head":
                self.drip(b"H", 0.05)
            case _:
                self.send_error(404)

    def redirect(self, target):
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def answer(self, content, length=None, ends=True, wait=0.0):
        self.send_response(200)
        if ends:
            self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)
        if not ends:
            self.drip(content, wait)

    def drip(self, content, wait):
        with suppress(OSError):
            while not self.server.closing.wait(wait):
                self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.closing = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    waits = []
    monkeypatch.setattr(urls.time, "sleep", waits.append)
    return waits


@pytest.fixture
def open_server(server, monkeypatch, waits):
    """The server, whose address (but none else of this machine) passes for a public one."""
    monkeypatch.setattr(urls, "is_public", lambda address: address == "127.0.0.1")
    return server


def test_rows_fetch_urls_only_if_that_is_allowed(open_server, tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps([{"image": f"{open_server.url}/a.png", "prompt": "p"}]))
    size = {"height": 16, "width": 32}
    with pytest.raises(ValueError, match="row 1: .*is a URL, which is not fetched; .* dataset.allow_urls=true"):
        UnifiedDataset.from_folder(str(tmp_path), **size).scan()
    assert open_server.asked == []
    dataset = UnifiedDataset.from_folder(str(tmp_path), allow_urls=True, **size)
    assert dataset.scan() == [] and dataset[0]["image"].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "trap.example.org"])
def test_a_url_of_this_machine_is_never_asked_for(server, host, monkeypatch):
    """By its address, by name, and by a name of anyone that resolves to it."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        urls.socket, "getaddrinfo", lambda name, *a, **k: look_up(name.replace(host, "127.0.0.1"), *a, **k)
    )
    with pytest.raises(ValueError, match=rf"leads to {host} \(127.0.0.1\), which is no public address"):
        LoadImage()(f"http://{host}:{server.server_port}/a.png")
    assert server.asked == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/inside", r"leads to 127.0.0.2 \(127.0.0.2\), which is no public address"),
        ("/ftp", "leads to 'ftp://127.0.0.1:.*'; expected an http or https URL"),
        ("/file", "leads to 'file:///etc/hostname'; expected an http or https URL"),
        ("/round", "is redirected more than 5 times"),
        ("/page", "is not an image that Pillow can read; it begins with b'<!DOCTYPE html>'"),
        ("/gone.png", "could not be fetched: the server answers 404"),
        ("/short", "could not be fetched in 3 tries: the connection ended 4 bytes early"),
    ],
)
def test_what_a_url_may_not_lead_to_is_named(open_server, path, message):
    with pytest.raises(ValueError, match=message):
        LoadImage()(open_server.url + path)
    assert "/a.png" not in open_server.asked


def test_a_redirect_within_the_public_is_followed(open_server):
    assert LoadImage()(f"{open_server.url}/moved").size == (32, 16)
    assert LoadImage()(f"{open_server.url}/a.png?size=ü#part").size == (32, 16)
    assert open_server.asked == ["/moved", "/a.png", "/a.png?size=%C3%BC"]


def test_a_busy_server_is_asked_three_times_with_growing_waits(open_server, waits):
    assert LoadImage()(f"{open_server.url}/busy.png").size == (32, 16)
    assert waits == [1, 2]


def test_a_server_that_has_no_such_file_is_asked_once(open_server, waits):
    with pytest.raises(ValueError, match="could not be fetched: the server answers 404"):
        read_url(f"{open_server.url}/gone.png")
    assert waits == [] and len(open_server.asked) == 1


def test_a_connection_that_opens_after_the_limit_of_time_is_left(open_server, monkeypatch):
    monkeypatch.setattr(urls, "SECONDS", 0)
    monkeypatch.setattr(urls, "_abort", lambda connection: None)  # it comes before the socket is open
    answers = []
    monkeypatch.setattr(urls.HTTPConnection, "getresponse", lambda opened: answers.append(opened))
    with pytest.raises(ValueError, match="it takes longer than 0 s"):
        read_url(f"{open_server.url}/a.png")
    assert answers == []


def test_an_error_of_the_content_stays_what_it_is_after_the_limit_of_time(open_server, monkeypatch):
    monkeypatch.setattr(urls, "SECONDS", 0)
    with pytest.raises(ValueError, match="leads to 127.0.0.2"):
        read_url("http://127.0.0.2/a.png")


def test_a_file_without_end_is_left_at_the_limit_of_bytes(open_server, monkeypatch):
    monkeypatch.setattr(urls, "BYTES", 1 << 20)
    with pytest.raises(ValueError, match="is larger than 1 MiB, the most that is downloaded"):
        read_url(f"{open_server.url}/endless")
    assert len(open_server.asked) == 1


@pytest.mark.parametrize("path", ["/slow", "/slow_head"])
def test_a_server_that_is_never_silent_is_left_at_the_limit_of_time(open_server, path, monkeypatch):
    monkeypatch.setattr(urls, "SECONDS", 0.2)
    with pytest.raises(ValueError, match="could not be fetched in 3 tries: it takes longer than 0.2 s"):
        read_url(open_server.url + path)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.168.1.1"),
        *("224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fd00::1", "ff02::1"),
        *("fec0::1", "64:ff9b:1::7f00:1", "::127.0.0.1", "::ffff:0:127.0.0.1", "3fff::1", "5f00::1"),
        *("::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:7f00:1::"),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_that_are_public(address):
    assert is_public(address)
