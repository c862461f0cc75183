"""Reward training: `python reward.py reward=… task=reward/… model=… prompts.path=… held_out.path=…`.

Stage one: the prompts are encoded into the caches `train` and `held_out` in `prompts_path`.
Stage two: in rounds, the model samples pictures of prompts, rewards score them, and train.py trains on the samples.
"""

import logging
from dataclasses import replace

import hydra

from diffsynth.config import build, check, check_choices, claim, explained, finish, run_main
from diffsynth.training.run import RewardRun
from train import train


def reward(run: RewardRun) -> list:
    """Encode the prompts that are not encoded yet, train in rounds, and return the paths of the exported files.

    Raises:
        ValueError: The task does not learn from samples of its own, or there is no reward.
    """
    from diffsynth.cache.run import CacheRun
    from diffsynth.core.data import CachedDataset
    from diffsynth.training.rounds import Rounds
    from diffsynth.training.rounds.checks import check_rewards
    from diffsynth.training.rounds.held_out import HeldOut
    from diffsynth.training.rounds.samples import RoundSamples
    from make_cache import make_cache

    check_rewards(run)
    steps = run.rounds.steps(run.batch_size)
    shared = {"model": run.model, "task": run.task, "lora": run.lora, "device": run.device}
    caches = {}
    for name, prompts in {"train": run.prompts, "held_out": run.held_out}.items():
        if prompts is not None:
            path = f"{run.prompts_path}/{name}"
            logging.info("Prompts in %s: %s", path, make_cache(CacheRun(path=path, dataset=prompts, **shared)))
            caches[name] = CachedDataset(path)
    sizes = run.rounds.prompts, run.rounds.samples, run.rounds.levels
    samples = RoundSamples(caches["train"], *sizes, run.task, run.latents)
    held_out = HeldOut(caches.get("held_out"), run.reward, run.evaluation_reward, run.rounds, run.seed)
    rounds = Rounds(run.rounds, samples, steps, run.reward, held_out, run.guard, run.seed)
    return train(replace(run, dataset=samples, rounds=rounds))


@hydra.main(version_base="1.3", config_path="conf", config_name="reward")
def main(cfg) -> None:
    with explained():
        check_choices()
        check(cfg, RewardRun)
        if claim(cfg) is not None:
            finish(cfg, reward(RewardRun(**build(cfg))))


if __name__ == "__main__":
    run_main(main, RewardRun, resumes=True)
