"""Rounds of a reward training: sample with the policy, score, train on the samples, and again."""

from .rounds import Rounds
from .settings import Guard, RoundSettings

__all__ = ["Guard", "RoundSettings", "Rounds"]
