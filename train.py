"""Train: `python train.py model=… task=… lora.rank=…`; `python train.py --help` lists every choice."""

import hydra

from diffsynth.config import build, check, claim, explained, finish, run


def train(
    name: str,
    output_root: str,
    run_dir: str,
    model,
    dataset,
    task,
    memory,
    optimizer,
    lr_scheduler,
    logger,
    export,
    checkpoint,
    receipt,
    lora=None,
    template=None,
    ema=None,
    validation=None,
    device: str = "auto",
    seed: int = 0,
    max_steps: int | None = None,
    num_epochs: float = 1,
    batch_size: int = 1,
    micro_batch_size: int | None = None,
    max_grad_norm: float | None = None,
    max_bad_steps: int = 10,
) -> list:
    """Run one training, whose parts the configuration built, and name the files it left.

    Its signature is the schema of conf/training.yaml's top level.
    """
    from diffsynth.cache.keys import CachePlan
    from diffsynth.core.data import BatchPlan, CachedDataset
    from diffsynth.diffusion.template.rows import required_columns
    from diffsynth.diffusion.training_module import PipelineTrainingModule
    from diffsynth.plan import Run, needs_download, preflight
    from diffsynth.training.accelerator import make_accelerator
    from diffsynth.training.bad_steps import BadSteps
    from diffsynth.training.engines import choose_engine
    from diffsynth.training.loop import launch_training_task, order_of, record_data

    # Mistakes first: nothing heavy is read until all of these have found none.
    accelerator = make_accelerator(device, model.keywords["torch_dtype"])
    engine = choose_engine(accelerator)
    BatchPlan(batch_size, micro_batch_size, engine.replicas)
    template = template and template.load_one(seed)
    for rows in (dataset, *(validation.datasets.values() if validation else ())):
        rows.scan(required=required_columns(rows, task, template))
    if validation:
        validation.check(ema)
    export.check(validation.numbers if validation else ())
    fingerprint = dataset.fingerprint()
    record_data(accelerator, dataset, fingerprint, run_dir)
    checkpoint.identity = {"data set": fingerprint, **({"template": template.code.digest} if template else {})}
    pipe = None if needs_download(model) else model(device=accelerator.device)
    run = Run(
        model=model,
        dataset=dataset,
        task=task,
        memory=memory,
        optimizer=optimizer,
        checkpoint=checkpoint,
        export=export,
        lora=lora,
        template=template,
        ema=ema,
        validation=validation,
        seed=seed,
        max_steps=max_steps,
        num_epochs=num_epochs,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        processes=accelerator.num_processes,
        engine=engine.file,
        cp_size=engine.cp_size,
    )
    memory, micro_batch_size = preflight(run, accelerator, run_dir)
    pipe = pipe or model(device=accelerator.device)  # what is to be downloaded is known to fit
    plan = BatchPlan(batch_size, micro_batch_size, engine.replicas)
    module = PipelineTrainingModule(pipe, task, lora, seed, template, memory)
    engine.check(module, optimizer, plan.accumulation, max_grad_norm)
    if is_cached := isinstance(dataset, CachedDataset):
        dataset.check_made_for(CachePlan(module).about())
    module.rehearse(dataset)
    also = validation.models(module) if validation else ()
    if accelerator.is_main_process:
        order = order_of(dataset, batch_size, seed)
        receipt.write(module.pipe, dataset, order, validation.datasets if validation else {}, seed)
    module.load(also, is_cached, engine.in_host_memory(module))
    launch_training_task(
        accelerator,
        dataset,
        module,
        export,
        max_steps=max_steps,
        num_epochs=num_epochs,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        max_grad_norm=max_grad_norm,
        seed=seed,
        num_workers=dataset.num_workers,
        ema=ema,
        checkpoints=checkpoint,
        logger=logger,
        validation=validation,
        bad_steps=BadSteps(f"{run_dir}/bad_steps.jsonl", max_bad_steps),
        engine=engine,
    )
    record_data(accelerator, dataset, fingerprint, run_dir)  # with those that could not be decoded
    return [*export.saved, *(validation.saved if validation else ())]


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg) -> None:
    with explained():
        check(cfg, train)
        if (run_dir := claim(cfg)) is not None:
            finish(run_dir, train(**build(cfg)))


if __name__ == "__main__":
    run(main)
