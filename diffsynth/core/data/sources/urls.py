"""Download files that rows name by http(s) URLs: from public addresses only, with limits of bytes and time."""

import socket
import ssl
import time
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BytesIO
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from threading import Timer
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from .storage import EmbeddedFile

SECONDS = 60  # for one try, from the connection to the last byte; a guess
SILENCE = 30  # seconds that a server may take for its next bytes; a guess
BYTES = 64 << 20  # of one file; a guess
PIECE = 1 << 16  # bytes that are read at a time
REDIRECTS = 5  # a guess; browsers follow 20
NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
# Of IANA's registry of special addresses and RFC 4291, those that Python counts as global: addresses that stand for
# IPv4 ones, of this machine too (::/96, RFC 2765, RFC 8215), site-local ones, documentation, segment routing.
NOT_PUBLIC = [
    IPv6Network(block)
    for block in ("::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "fec0::/10", "3fff::/20", "5f00::/16")
]
MOVED = (301, 302, 303, 307, 308)
MAY_PASS = (408, 429)  # of the errors that are the client's: too slow, and too many requests


def is_url(path: str | EmbeddedFile) -> bool:
    """Whether a file name is an http(s) URL."""
    return isinstance(path, str) and path.lower().startswith(("http://", "https://"))


def read_url(url: str) -> BytesIO:
    """Download a URL; up to 3 tries, 1 s and 2 s apart (guesses).

    Proxies of the environment are not used: behind one, nobody here would know which address is connected to.

    Raises:
        ValueError: It leads to an address that is not public or to another protocol, is larger than `BYTES`, or cannot
            be fetched.
    """
    for wait in (1, 2, None):
        try:
            return _fetch(url)
        except (OSError, HTTPException) as error:
            if wait is None:
                raise ValueError(f"could not be fetched in 3 tries: {error or type(error).__name__}") from error
            time.sleep(wait)


def _fetch(url: str) -> BytesIO:
    """The content of a URL; follows redirects, each of which is checked as the first one is."""
    end = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        connection = _connection(parts := urlsplit(url))
        # A server that sends a byte now and then would never be silent for long.
        watch = Timer(max(0, end - time.monotonic()), _abort, [connection])
        watch.start()
        try:
            response = _ask(connection, parts, end)
            if response.status in MOVED:
                url = urljoin(url, response.getheader("Location", ""))
                continue
            if 400 <= response.status < 500 and response.status not in MAY_PASS:
                raise ValueError(f"could not be fetched: the server answers {response.status} {response.reason}")
            if response.status != 200:
                raise OSError(f"the server answers {response.status} {response.reason}")
            return _read(response, end)
        except (OSError, HTTPException):
            _require_before(end)  # otherwise the connection was cut off
            raise
        finally:
            watch.cancel()
            connection.close()
    raise ValueError(f"is redirected more than {REDIRECTS} times")


def _connection(parts: SplitResult) -> HTTPConnection:
    """A connection, not open yet, to the host of a URL."""
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"leads to {parts.geturl()!r}; expected an http or https URL")
    kind = PublicHTTPSConnection if parts.scheme == "https" else PublicHTTPConnection
    return kind(parts.hostname, parts.port, timeout=SILENCE)


def _ask(connection: HTTPConnection, parts: SplitResult, end: float) -> HTTPResponse:
    target = quote(f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}", safe="/%?=&:;,+@!$'()*~[]|")
    connection.request("GET", target, headers={"User-Agent": "diffsynth-hydra"})
    _require_before(end)  # while the socket connects, `_abort` finds nothing to cut off
    return connection.getresponse()


def _require_before(end: float) -> None:
    if time.monotonic() >= end:
        raise OSError(f"it takes longer than {SECONDS} s")


def _read(response: HTTPResponse, end: float) -> BytesIO:
    content = BytesIO()
    while piece := response.read1(PIECE):
        content.write(piece)
        if content.tell() > BYTES:
            raise ValueError(f"is larger than {BYTES >> 20} MiB, the most that is downloaded; save it in the folder")
    _require_before(end)  # otherwise the connection was cut off, which looks like the end of the file
    if response.length:
        raise OSError(f"the connection ended {response.length} bytes early")
    content.seek(0)
    return content


def _abort(connection: "PublicHTTPConnection | PublicHTTPSConnection") -> None:
    with suppress(OSError, AttributeError):  # it may not be open yet, or closed already
        connection.opened.shutdown(socket.SHUT_RDWR)


class PublicHTTPConnection(HTTPConnection):
    """An HTTP connection to a public address; `opened` is its socket, which `sock` no longer is during an answer."""

    opened: socket.socket | None = None

    def connect(self) -> None:
        self.sock = self.opened = _connect(self.host, self.port, self.timeout)


class PublicHTTPSConnection(HTTPSConnection):
    """An HTTPS connection to a public address; see `PublicHTTPConnection`."""

    opened: ssl.SSLSocket | None = None

    def connect(self) -> None:
        plain, context = _connect(self.host, self.port, self.timeout), ssl.create_default_context()
        self.sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        self.opened = self.sock
        self.opened.do_handshake()


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to a host. The address that is checked is the one connected to: a second look-up may give another one.

    Raises:
        ValueError: The host has an address that is not public.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in found:
        if not is_public(address[0]):
            raise ValueError(f"leads to {host} ({address[0]}), which is no public address")
    for *_, address in found[:-1]:
        with suppress(OSError):
            return socket.create_connection(address[:2], timeout)
    return socket.create_connection(found[-1][-1][:2], timeout)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not private, loopback, link-local or multicast."""
    ip = _embedded(ip_address(address.partition("%")[0]))
    return ip.is_global and not ip.is_multicast and not any(ip in block for block in NOT_PUBLIC)


def _embedded(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address stands for; any other address itself."""
    if isinstance(ip, IPv6Address):
        if ip in NAT64:
            return IPv4Address(int(ip) & 0xFFFFFFFF)
        return ip.ipv4_mapped or ip.sixtofour or ip
    return ip
