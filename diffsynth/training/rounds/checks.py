"""Checks of a reward training before any weight is read."""

from itertools import chain
from typing import TYPE_CHECKING

from ...diffusion.rewards import Reward

if TYPE_CHECKING:
    from ...core.data import TrainingData
    from ..run import RewardRun


def check_rewards(run: "RewardRun") -> None:
    """Check the task, and that all rewards have their packages, files and columns.

    Raises:
        ValueError: The task does not learn from samples of its own, there is no reward, or a row lacks a column.
        ImportError, OSError: A reward lacks a package or weights; names it.
    """
    if not run.task.learns_from_samples:
        raise ValueError(
            f"The task is {type(run.task).__name__}, which learns from a data set: run it by python train.py, or "
            "choose task=reward/nft, task=reward/awm or task=reward/rwr."
        )
    unknown = sorted({*(run.guard and run.guard.evaluation or ())} - run.evaluation_reward.keys())
    if unknown:
        raise ValueError(
            f"guard.evaluation names {unknown[0]}, which is no evaluation reward; expected one of "
            f'{sorted(run.evaluation_reward)}: set "reward@evaluation_reward=[{unknown[0]}]", or leave it out.'
        )
    if run.held_out is not None:
        check_apart(run.prompts, run.held_out)
    if not run.reward:
        raise ValueError("There is no reward: choose one or several, such as reward=jpeg_size.")
    for group, rewards in {"reward": run.reward, "evaluation_reward": run.evaluation_reward}.items():
        for name, reward in rewards.items():
            if not isinstance(reward, Reward):
                raise ValueError(f"{group}.{name} is {reward!r}; expected an option of the group reward.")
            reward.find()
            for row in chain.from_iterable(prompts.rows for prompts in (run.prompts, run.held_out) if prompts):
                reward.check_rows(row)


def check_apart(prompts: "TrainingData", held_out: "TrainingData") -> None:
    """Check that no held-out prompt is trained on.

    Raises:
        ValueError: One is; names it.
    """
    both = {row["prompt"] for row in held_out.rows} & {row["prompt"] for row in prompts.rows}
    if both:
        raise ValueError(
            f"{held_out.metadata_path} holds {len(both)} prompts that {prompts.metadata_path} holds as well, such as "
            f"{min(both)!r:.300}; held-out prompts tell nothing then: take them out of one of the files, or set "
            "held_out=null."
        )
