"""`HttpReward`: scores from a server, which may have an environment and a GPU of its own."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ...core.json_text import fits
from ...core.ranges import BatchSize, NonNegativeInt, NonZero, PositiveFloat, check_arguments
from .base import Pictures, Reward, Rows
from .server import Server, png_in_base64

logger = logging.getLogger(__name__)


class HttpReward(Reward):
    """Asks a server for scores; `python -m diffsynth.rewards.serve` makes one of a function, and documents the format.

    The server's version is asked for at first, and is in every answer: scores of two versions do not compare.

    Args:
        url: The server's address, such as http://localhost:8000.
        batch_size: Pictures of a request.
        timeout: Seconds until a request must have been answered.
        retries: Further tries after an error that may pass, 1, 2, 4, … s apart.
    """

    def __init__(
        self,
        url: str,
        batch_size: BatchSize = 16,
        timeout: PositiveFloat = 60.0,
        retries: NonNegativeInt = 3,
        weight: NonZero = 1.0,
    ):
        super().__init__(weight)
        check_arguments(HttpReward.__init__, "reward.", batch_size=batch_size)
        self.server, self.batch_size = Server(url, timeout, retries), batch_size

    @cached_property
    def server_version(self) -> str:
        """The version of the scorer, asked for once."""
        return self._version_in(self.server.ask("/health"))

    @property
    def version(self) -> str:
        return f"HttpReward {self.server_version}"

    def find(self) -> None:
        _ = self.server_version

    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Rows, device: torch.device) -> Tensor:
        requests = [
            {"prompt": prompt, "image": png_in_base64(picture), "row": dict(row)}
            for picture, prompt, row in zip(pictures, prompts, rows, strict=True)
        ]
        starts = range(0, len(requests), self.batch_size)
        batches = [requests[start : start + self.batch_size] for start in starts]
        return torch.tensor([score for batch in batches for score in self._scores(batch)])

    def _scores(self, requests: Sequence[Mapping[str, Any]]) -> list[float]:
        expected = self.server_version
        answer = self.server.ask("/score", {"requests": requests})
        if (found := self._version_in(answer)) != expected:
            raise ValueError(
                f"{self.server.url} has version {found!r} now, and had {expected!r} when the run began, so that scores "
                "do not compare; start the server as it was, or begin another run."
            )
        scores = answer.get("scores")
        if not isinstance(scores, list) or len(scores) != len(requests):
            raise ValueError(f"{self._answers(scores)}; expected a list of {len(requests)} scores.")
        if wrong := [score for score in scores if score is not None and not fits(score, Real)]:
            raise ValueError(f"{self._answers(wrong[0])} as a score; expected a number, or null.")
        if unscored := scores.count(None):
            reason = next(filter(None, answer.get("errors") or []), "it does not say why")
            logger.warning("%s could not score %d of %d pictures: %s", self.server.url, unscored, len(scores), reason)
        return [float("nan") if score is None else float(score) for score in scores]

    def _version_in(self, answer: Mapping[str, Any]) -> str:
        if not isinstance(answer.get("version"), str):
            raise ValueError(f"{self._answers(dict(answer))}; expected a text as its version.")
        return answer["version"]

    def _answers(self, value: Any) -> str:
        return f"{self.server.url} answers {value!r:.300}"
