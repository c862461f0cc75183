"""Settings of the rounds of a reward training: `rounds` and `guard` in conf/reward.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from ...core.ranges import BatchSize, PositiveFloat, PositiveInt, at_least, check_fields
from ...core.ranges import PositiveFraction as Fraction
from ...diffusion.rewards.advantages import Std


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """How much is sampled in a round, and what becomes of it.

    Args:
        path: Folder of the rounds' samples.
        prompts: Prompts per round.
        samples: Samples per prompt, of which the better ones are preferred to the others.
        curriculum: A round has its prompts from this many times as many candidates: those whose samples' rewards
            differed most the last time, and new ones before all others. 1 takes all prompts in turn.
        levels: How often a round trains each sample, each time at another noise level.
        batch_size: Samples that are sampled as one batch.
        std: Which standard deviation divides the rewards; see `diffusion.rewards.advantages`.
        keep_last: Number of the last rounds whose samples and pictures stay on disk.
        evaluate_every: Rounds between evaluations on held-out prompts.
        held_out_prompts: Number of the first held-out prompts that are sampled.
        held_out_samples: Samples of each of them.
    """

    path: str
    prompts: PositiveInt = 16
    samples: Annotated[int, at_least(2)] = 8
    curriculum: PositiveInt = 1
    levels: PositiveInt = 1
    batch_size: BatchSize = 32
    std: Std = "group"
    keep_last: PositiveInt = 2
    evaluate_every: PositiveInt = 5
    held_out_prompts: PositiveInt = 32
    held_out_samples: PositiveInt = 2

    def __post_init__(self):
        check_fields(self, "rounds.")
        if self.samples < 2:
            raise ValueError(
                f"rounds.samples is {self.samples}; expected at least 2, because a sample is compared with the others "
                "of its prompt."
            )

    def steps(self, batch_size: int) -> int:
        """Optimizer steps per round.

        Raises:
            ValueError: They are not whole; names numbers that fit.
        """
        trained = self.prompts * self.samples * self.levels
        if trained % batch_size:
            fitting = [size for size in range(1, trained + 1) if trained % size == 0]
            nearest = min(fitting, key=lambda size: abs(size - batch_size))
            raise ValueError(
                f"A round trains {trained} samples (rounds.prompts={self.prompts} x rounds.samples={self.samples} x "
                f"rounds.levels={self.levels}), which batch_size={batch_size} does not divide; set batch_size={nearest}"
                ", say."
            )
        return trained // batch_size


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Bounds whose crossing shows that the samples collapse, and what happens then.

    Args:
        diversity: The mean distance between a prompt's samples must stay above this share of that of the first round;
            0 does not look.
        evaluation: How far the means of evaluation rewards on held-out prompts may fall below their first values, by
            name, in the reward's own unit; None looks at none.
        action: `stop` ends the run as if it were complete; `lower_rate` multiplies the learning rate by `factor`.
        factor: See `action`.
    """

    diversity: Annotated[float, at_least(0)] = 0.3
    evaluation: Mapping[str, PositiveFloat] | None = None
    action: Literal["stop", "lower_rate"] = "stop"
    factor: Fraction = 0.5

    def __post_init__(self):
        check_fields(self, "guard.")
