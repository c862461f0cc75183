"""Distil a few-step student: `python distill.py task=distill/… model=… prompts.path=…`.

Stage one: the teacher samples images for two sets of prompts into the caches `train` and `held_out` in `teacher_path`.
Stage two: train.py trains the student on the first cache, and validation compares student and teacher on the second.
"""

import logging
from dataclasses import replace

import hydra

from diffsynth.config import build, check, check_choices, claim, explained, finish, run_main
from diffsynth.training.run import DistillRun
from train import train


def distill(run: DistillRun) -> list:
    """Sample the teacher's images that are missing, train on them, and return the paths of the exported files.

    Raises:
        ValueError: The task is no distillation.
    """
    from diffsynth.cache.run import CacheRun
    from make_cache import make_cache

    if not run.task.is_distillation:
        raise ValueError(
            f"The task is {type(run.task).__name__}, which is no distillation: run it by python train.py, or choose "
            "task=distill or task=distill/…."
        )
    if run.task.teacher is not None:
        shared = {"model": run.model, "task": run.task, "lora": run.lora, "device": run.device}
        for name, prompts in {"train": run.prompts, "held_out": run.held_out}.items():
            if prompts is not None:
                path = f"{run.teacher_path}/{name}"
                logging.info("The teacher samples the images that are missing in %s; this may be interrupted.", path)
                report = make_cache(CacheRun(path=path, dataset=prompts, **shared))
                logging.info("The teacher's images in %s: %s", path, report)
    return train(replace(run, dataset=run.dataset()))


@hydra.main(version_base="1.3", config_path="conf", config_name="distill")
def main(cfg) -> None:
    with explained():
        check_choices()
        check(cfg, DistillRun)
        if claim(cfg) is not None:
            finish(cfg, distill(DistillRun(**build(cfg))))


if __name__ == "__main__":
    run_main(main, DistillRun, resumes=True)
