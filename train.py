"""Train: `python train.py model=… task=… lora.rank=…`; `python train.py --help` lists every option."""

import hydra

from diffsynth.config import build, check, check_choices, claim, explained, finish, run_main
from diffsynth.training.run import Run


def train(run: Run) -> list:
    """Run one training, and return the paths of the exported weights and of the validation's pictures."""
    from diffsynth.cache.keys import CacheKeys
    from diffsynth.diffusion.training_module import PipelineTrainingModule
    from diffsynth.plan.meta_pipeline import needs_download
    from diffsynth.plan.preflight import preflight
    from diffsynth.training.accelerator import make_accelerator
    from diffsynth.training.checks import check_average, check_run, identity_of
    from diffsynth.training.engines import choose_engine
    from diffsynth.training.loop import Trainer
    from diffsynth.training.record.data import record_data
    from diffsynth.training.record.inputs import record_inputs

    # Check the configuration and the data before anything heavy is read.
    accelerator = make_accelerator(run.device, run.model.keywords["torch_dtype"], run.deterministic)
    engine = choose_engine(accelerator)
    run = run.with_template()
    check_run(run, engine)
    identity = identity_of(run)
    record_data(accelerator, run.dataset, identity["data set"], run.run_dir)

    # Check that the run fits; models that have to be downloaded are built only after that.
    pipe = None if needs_download(run.model) else run.model(device=accelerator.device)
    run = preflight(run, accelerator, engine)
    pipe = pipe or run.model(device=accelerator.device)
    identity |= record_inputs(accelerator, run, pipe)

    # Build the training module, and check that its parts work together.
    module = PipelineTrainingModule(pipe, run.task, run.lora, run.seed, run.template, run.memory)
    trainer = Trainer.of(run, accelerator, engine, module, identity)
    engine.check(module, run.optimizer, trainer.layout.accumulation, run.max_grad_norm)
    check_average(run.ema, module)
    keys = CacheKeys(module)
    run.dataset.check_made_for(keys.about, keys.of)
    module.rehearse(run.dataset)
    evaluated = trainer.validation.models(module)
    if accelerator.is_main_process:
        run.data_report.write(pipe, run.dataset, trainer.order, trainer.validation.datasets, run.seed, run.samples)

    # Load weights, and train.
    module.load(evaluated, not run.dataset.needs_encoders, engine.in_host_memory(module))
    trainer.fit()
    record_data(accelerator, run.dataset, identity["data set"], run.run_dir)  # again, with rows that failed to decode
    return [*run.export.saved, *trainer.validation.saved]


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg) -> None:
    with explained():
        check_choices()
        check(cfg, Run)
        if claim(cfg) is not None:
            finish(cfg, train(Run(**build(cfg))))


if __name__ == "__main__":
    run_main(main, Run, resumes=True)
