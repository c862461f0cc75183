"""Stage one of two: `python make_cache.py model=… dataset=… path=…`; then `python train.py dataset=cache …`.

`python make_cache.py verify …`, with the same options, checks a cache's files and compares the cache with its data and
models; `stats path=…` counts what it has; `gc path=…` deletes entries that no sample needs any more.
"""

import logging
import sys
from difflib import get_close_matches

import hydra

from diffsynth.cache.run import COMMANDS, CacheRun
from diffsynth.config import build, check, explained, run_main


def make_cache(run: CacheRun) -> str:
    """Run one command on a cache and return a report of it.

    Raises:
        ValueError: `verify` finds differences, and the message lists them; or the cache was made of another data set.
    """
    from diffsynth.cache.make import launch_data_process_task
    from diffsynth.cache.verify import collect_garbage, stats, verify
    from diffsynth.diffusion.training_module import PipelineTrainingModule
    from diffsynth.training.accelerator import make_accelerator
    from diffsynth.training.checks import check_images, scan

    if run.command in ("stats", "gc"):
        return {"stats": stats, "gc": collect_garbage}[run.command](run.path)
    accelerator = make_accelerator(run.device, run.model.keywords["torch_dtype"])
    run = run.with_template()
    scan(run.dataset, run.media, run.task, run.template)
    check_images(run.dataset, run.task, run.model.func.__self__)
    module = PipelineTrainingModule(run.model(device=accelerator.device), run.task, run.lora, run.seed, run.template)
    if run.command == "verify":
        if differences := verify(run.dataset, module, run.path):
            compared = f"the data set {run.dataset.metadata_path}, this model or this task"
            heading = f"{run.path} differs from {compared}; run make_cache.py again to update it"
            raise ValueError("\n  ".join([heading, *differences]))
        return f"no differences from {run.dataset.metadata_path}"
    sizes = run.batch_size, run.dataset.workers_on(accelerator.device), run.shard_megabytes << 20
    return str(launch_data_process_task(accelerator, run.dataset, module, run.path, *sizes))


@hydra.main(version_base="1.3", config_path="conf", config_name="make_cache")
def main(cfg) -> None:
    with explained():
        check(cfg, CacheRun)
        run = CacheRun(**build(cfg))
        logging.info("%s: %s", run.path, make_cache(run))


if __name__ == "__main__":
    sys.argv[1:] = [f"command={word}" if get_close_matches(word, COMMANDS, 1) else word for word in sys.argv[1:]]
    run_main(main, CacheRun, resumes=True)
