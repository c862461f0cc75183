"""Distil a few-step student: `python distill.py task=distill/… model=… prompts.path=…`.

Stage one: the teacher draws two sets of prompts into caches, `train` and `held_out` in `teacher_path`. Stage two is
train.py on the first, which measures on the second how near the student comes.
"""

import logging

import hydra

from diffsynth.config import build, check, claim, explained, finish, run, with_arguments_of
from train import train


@with_arguments_of(train)
def distill(prompts, held_out, teacher_path: str, **training) -> list:
    """Draw the teacher's pictures that are not there yet, train on them, and name the files that the training left.

    Its signature is the schema of conf/distill.yaml's top level.

    Args:
        prompts, held_out: Data sets of prompts, for the training and for the validation; None draws nothing.
        dataset: Opens what is trained on; called when the pictures are there.
    """
    from make_cache import make_cache

    shared = {name: training[name] for name in ("model", "task", "lora", "device") if name in training}
    if getattr(training["task"], "teacher", None) is not None:
        for name, rows in {"train": prompts, "held_out": held_out}.items():
            if rows is not None:
                report = make_cache(f"{teacher_path}/{name}", dataset=rows, **shared)
                logging.info("The teacher's pictures, %s/%s: %s", teacher_path, name, report)
    return train(**training | {"dataset": training["dataset"]()})


@hydra.main(version_base="1.3", config_path="conf", config_name="distill")
def main(cfg) -> None:
    with explained():
        check(cfg, distill)
        if (run_dir := claim(cfg)) is not None:
            finish(run_dir, distill(**build(cfg)))


if __name__ == "__main__":
    run(main)
