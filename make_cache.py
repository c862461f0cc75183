"""Stage one of two: `python make_cache.py model=… dataset=… path=…`; then `python train.py dataset=cache …`.

`python make_cache.py verify path=…` compares a cache with what was written and with the data and models it is made of,
`stats` counts what it holds, `gc` deletes what no sample needs any more.
"""

import logging
import sys
from typing import Literal

import hydra

from diffsynth.config import build, check, explained, run

COMMANDS = ("make", "verify", "stats", "gc")


def make_cache(
    path: str,
    model,
    dataset,
    task,
    lora=None,
    template=None,
    command: Literal["make", "verify", "stats", "gc"] = "make",
    batch_size: int = 8,
    shard_megabytes: int = 256,
    device: str = "auto",
    seed: int = 0,
):
    """Make (a `CacheReport`), verify (a list of differences), count or tidy a cache (text).

    Its signature is the schema of conf/make_cache.yaml's top level.
    """
    from diffsynth.cache.make import launch_data_process_task
    from diffsynth.cache.verify import collect_garbage, stats, verify
    from diffsynth.diffusion.template.rows import required_columns
    from diffsynth.diffusion.training_module import PipelineTrainingModule
    from diffsynth.training.accelerator import make_accelerator

    if command in ("stats", "gc"):
        return {"stats": stats, "gc": collect_garbage}[command](path)
    accelerator = make_accelerator(device, model.keywords["torch_dtype"])
    template = template and template.load_one(seed)
    dataset.scan(required=required_columns(dataset, task, template))
    module = PipelineTrainingModule(model(device=accelerator.device), task, lora, seed, template)
    if command == "verify":
        return verify(dataset, module, path)
    shard_bytes = shard_megabytes << 20
    return launch_data_process_task(accelerator, dataset, module, path, batch_size, dataset.num_workers, shard_bytes)


@hydra.main(version_base="1.3", config_path="conf", config_name="make_cache")
def main(cfg) -> None:
    with explained():
        check(cfg, make_cache)
        result = make_cache(**build(cfg))
    differences = result if isinstance(result, list) else []
    if isinstance(result, list):
        result = "\n  ".join([f"{len(result) or 'no'} differences", *result])
    logging.info("%s: %s", cfg.path, result)
    if differences:
        sys.exit(1)


if __name__ == "__main__":
    sys.argv[1:2] = [f"command={word}" if word in COMMANDS else word for word in sys.argv[1:2]]
    run(main)
