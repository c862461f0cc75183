"""JSON over HTTP, for rewards that another process computes: time limits, and retries of what may pass."""

import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from PIL import Image

from ...core.json_text import parse, to_json
from ...core.ranges import NonNegativeInt, PositiveFloat, check_fields

MAY_PASS = (408, 425, 429)  # of the client's errors; all of the server's own, from 500, may pass
PIECE = 1 << 16  # bytes that are read at a time
SHOWN = 300  # characters of an answer in an error


@dataclass
class Server:
    """A server that answers requests with JSON objects.

    Args:
        url: Its address, `http://host:port` and a path.
        timeout: Seconds until the whole answer to a request must have come.
        retries: Further tries after an error that may pass, 1, 2, 4, … s apart.
        headers: Further headers of each request.
    """

    url: str
    timeout: PositiveFloat = 60.0
    retries: NonNegativeInt = 3
    headers: Mapping[str, str] | None = None

    def __post_init__(self):
        check_fields(self, "reward.")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"reward.url is {self.url!r}; expected an address such as http://localhost:8000.")
        self.url = self.url.rstrip("/")

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a GET, or to a POST of JSON; numbers in it that are not finite are None.

        Raises:
            ConnectionError: There is no answer in all tries, or the server reports a fault of its own.
            ValueError: The server refuses the request, or answers something else than a JSON object.
        """
        data = None if body is None else to_json(body).encode()
        headers = {"Content-Type": "application/json", **(self.headers or {})}
        request = Request(self.url + path, data, headers)
        for attempt in range(self.retries + 1):
            try:
                return self._object(path, self._fetch(request))
            except (OSError, HTTPException) as error:
                reason = self._reason(path, error)
                if attempt < self.retries:
                    time.sleep(2**attempt)
        raise ConnectionError(
            f"{self.url}{path} gave no answer in {self.retries + 1} tries of {self.timeout} s, the last one because of "
            f"{reason}; start the server, or raise the reward's timeout or retries, and run the same command again."
        )

    def _fetch(self, request: Request) -> bytes:
        end = time.monotonic() + self.timeout
        with urlopen(request, timeout=self.timeout) as response:
            return _read(response, end)

    def _reason(self, path: str, error: Exception) -> str:
        """Why a try failed.

        Raises:
            ValueError: The server refuses the request, and will do so again.
        """
        if not isinstance(error, HTTPError):
            return f"{type(error).__name__}: {error}"
        said = error.read(SHOWN).decode(errors="replace")
        if error.code < 500 and error.code not in MAY_PASS:
            raise ValueError(f"{self.url}{path} refuses the request with status {error.code}: {said}") from error
        return f"status {error.code}: {said}"

    def _object(self, path: str, content: bytes) -> dict[str, Any]:
        text = content.decode(errors="replace")
        try:
            answer = parse(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ValueError(
                f"{self.url}{path} answers {text[:SHOWN]!r}; expected a JSON object: is it another server?"
            )
        return answer


def _read(response: HTTPResponse, end: float) -> bytes:
    """The body of an answer, if it has come before `end`."""
    pieces = []
    while piece := response.read1(PIECE):
        pieces.append(piece)
        if time.monotonic() >= end:
            raise TimeoutError("the answer takes too long")
    if response.length:
        raise ConnectionError(f"the answer ended {response.length} bytes early")
    return b"".join(pieces)


def png_in_base64(picture: Image.Image) -> str:
    """A picture as a PNG file in base64; a JPEG file would change it before it is scored."""
    file = BytesIO()
    picture.convert("RGB").save(file, "PNG")
    return b64encode(file.getvalue()).decode()
