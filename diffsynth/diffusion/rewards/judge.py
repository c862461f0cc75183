"""`Judge`: scores from a vision-language model that is asked in words."""

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...core.files import write_text
from ...core.json_text import fits, read_json, to_json
from ...core.ranges import NonNegativeInt, NonZero, PositiveFloat, PositiveInt, check_arguments
from .base import Pictures, Reward, Rows
from .server import Server, png_in_base64

logger = logging.getLogger(__name__)

SCORE = re.compile(r"Final Score:[\s*]*(-?\d+(?:\.\d+)?)", re.IGNORECASE)  # models like to write **Final Score:** 4
ANSWER = {"choices": [{"message": {"content": str}}]}


class Judge(Reward):
    """The number after the last `Final Score:` in the answer of a model to a rubric; NaN if there is none in range.

    The model is behind an API like OpenAI's (vLLM, SGLang, …) and answers at temperature 0: at others, scores of equal
    pictures differ. Answers are kept on disk, so that no picture is judged twice for a prompt.

    Args:
        url: The API's address, such as http://localhost:8000/v1.
        model: The model's name there.
        rubric: A text file, what the model is asked; `{prompt}` in it is replaced.
        cache: Folder of the answers.
        lowest, highest: The scores that the rubric asks for; others count as none.
        max_tokens: Length of an answer.
        workers: Requests at a time.
        timeout, retries: As of `HttpReward`.
        key_variable: Environment variable that holds the API's key; None sends none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        rubric: str,
        cache: str,
        lowest: float = 1.0,
        highest: float = 5.0,
        max_tokens: PositiveInt = 512,
        workers: PositiveInt = 8,
        timeout: PositiveFloat = 120.0,
        retries: NonNegativeInt = 3,
        key_variable: str | None = None,
        weight: NonZero = 1.0,
    ):
        super().__init__(weight)
        check_arguments(Judge.__init__, "reward.", max_tokens=max_tokens, workers=workers)
        if not lowest < highest:
            raise ValueError(
                f"reward.lowest is {lowest} and highest is {highest}; expected a lower and a higher score."
            )
        self.server = Server(url, timeout, retries, _authorisation(key_variable))
        self.model, self.rubric_file, self.cache = model, Path(rubric), Path(cache)
        self.lowest, self.highest, self.max_tokens, self.workers = lowest, highest, max_tokens, workers

    @cached_property
    def rubric(self) -> str:
        """The text of the rubric.

        Raises:
            ValueError: It does not name the prompt or the line of the score.
        """
        text = self.rubric_file.read_text(encoding="utf-8")
        if absent := [part for part in ("{prompt}", "Final Score:") if part not in text]:
            raise ValueError(f"{self.rubric_file} has no {absent[0]!r}; expected a rubric that asks with it: add it.")
        return text

    @property
    def version(self) -> str:
        asked = blake2b(self.rubric.encode(), digest_size=8).hexdigest()
        return f"Judge {self.model} {asked} {self.lowest}..{self.highest} max_tokens={self.max_tokens}"

    def find(self) -> None:
        _ = self.rubric
        self.server.ask("/models")

    def score(self, pictures: Pictures, prompts: Sequence[str], rows: Rows, device: torch.device) -> Tensor:
        with ThreadPoolExecutor(self.workers) as pool:
            answers = list(pool.map(self.answer, pictures, prompts))
        scores = [self.score_in(answer) for answer in answers]
        if unscored := [answer for answer, score in zip(answers, scores, strict=True) if score is None]:
            counts = len(unscored), len(answers)
            logger.warning("%s gave %d of %d answers without a score: %.300r", self.model, *counts, unscored[0])
        return torch.tensor([float("nan") if score is None else score for score in scores])

    def answer(self, picture: Image.Image, prompt: str) -> str:
        """The model's answer, from the disk if it has given it before."""
        image, question = png_in_base64(picture), self.rubric.replace("{prompt}", prompt)
        digest = blake2b(to_json([self.model, self.max_tokens, question, image]).encode(), digest_size=16).hexdigest()
        file = self.cache / digest[:2] / f"{digest}.json"
        kept = read_json(file)
        if fits(kept, {"answer": str}):
            return kept["answer"]
        answer = self._ask(question, image)
        write_text(file, to_json({"model": self.model, "prompt": prompt, "answer": answer}))
        return answer

    def _ask(self, question: str, image: str) -> str:
        content = [
            {"type": "text", "text": question},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]
        body = {"model": self.model, "temperature": 0, "max_tokens": self.max_tokens}
        answer = self.server.ask("/chat/completions", body | {"messages": [{"role": "user", "content": content}]})
        if not (fits(answer, ANSWER) and answer["choices"]):
            raise ValueError(f"{self.server.url} answers {answer!r:.300}; expected a chat completion with a text.")
        return answer["choices"][0]["message"]["content"]

    def score_in(self, answer: str) -> float | None:
        """The score that an answer ends with; None if it has none, or one that the rubric does not ask for."""
        numbers = SCORE.findall(answer)
        score = float(numbers[-1]) if numbers else None
        return score if score is not None and self.lowest <= score <= self.highest else None


def _authorisation(key_variable: str | None) -> dict[str, str]:
    """The header with the API's key."""
    if key_variable is None:
        return {}
    if not os.environ.get(key_variable):
        raise ValueError(f"reward.key_variable is {key_variable}, which the environment does not have; export it.")
    return {"Authorization": f"Bearer {os.environ[key_variable]}"}
