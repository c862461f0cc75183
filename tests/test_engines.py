"""DeepSpeed's ZeRO and FSDP2 train what DDP trains, and take up one another's runs."""

import json
from functools import partial
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.engines
pytest.importorskip("deepspeed")

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = [
    "max_steps=4",
    "max_grad_norm=0.01",
    "checkpoint.every=2",
    "lr_scheduler=cosine",
    "ema=constant",
    "ema.decay=0.5",
    "export.save_steps=4",
]
LOOKING = [
    "validation=image_folder",
    "validation.prompts=[a red emoji]",
    "validation.weights=[raw,ema]",
    "validation.options={num_inference_steps: 2, height: 32, width: 32}",
    "validation.loss_samples=3",
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    f"+validation.datasets.held_out.path={tiny.dataset()}",
]


def job(folder: Path, engine: str, *overrides: str, **options) -> dict:
    return {"engine": engine, "overrides": tiny.merged(tiny.train_overrides(folder), overrides), **options}


def work(folder: Path, processes: int, jobs: list[dict]) -> None:
    """Do the jobs in `processes` processes, one after another."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", str(processes)]
    path = f"{tiny.ROOT}:{tiny.ROOT / 'tests'}"
    tiny.process(*torchrun, "tests/engine_worker.py", str(folder / "jobs.json"), PYTHONPATH=path)


def run_dir(root: Path) -> Path:
    (found,) = root.iterdir()
    return found


def losses(root: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir(root)) if "loss" in line]


def logged(root: Path, name: str) -> list[float]:
    return [line[name] for line in tiny.metrics(run_dir(root)) if name in line]


def weights(root: Path, kind: str = "") -> dict:
    return load_file(run_dir(root) / "weights" / f"step-4{kind}.safetensors")


def assert_same(found: Path, expected: Path) -> None:
    assert_close(losses(found), losses(expected), **CLOSE)
    for kind in ("", ".ema"):
        assert_close(weights(found, kind), weights(expected, kind), **CLOSE)


# One process ----------------------------------------------------------------------------------------------------------

ACCUMULATION = [*STEPS, "micro_batch_size=2", "memory=checkpointing"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder of runs, a folder each by name, that one process made; those with two engines are cut off and taken up."""
    root = tmp_path_factory.mktemp("alone")
    of = {
        name: partial(job, root / name)
        for name in ("ddp", "zero2", "zero3_offload", "zero3_offload_then_ddp", "ddp_then_zero2")
    }
    work(
        root,
        1,
        [
            of["ddp"]("ddp", *ACCUMULATION, *LOOKING),
            of["zero2"]("zero2", *ACCUMULATION, *LOOKING),
            of["zero3_offload"]("zero3_offload", *ACCUMULATION, *LOOKING),
            of["zero3_offload_then_ddp"]("zero3_offload", *ACCUMULATION, cut_off=3),
            of["zero3_offload_then_ddp"]("ddp", *ACCUMULATION),
            of["ddp_then_zero2"]("ddp", *ACCUMULATION, cut_off=3),
            of["ddp_then_zero2"]("zero2", *ACCUMULATION),
        ],
    )
    return root


@pytest.mark.parametrize("engine", ["zero2", "zero3_offload"])
def test_zero_trains_what_ddp_trains(alone, engine):
    assert_same(alone / engine, alone / "ddp")
    assert_close(logged(alone / engine, "grad_norm"), logged(alone / "ddp", "grad_norm"), **CLOSE)


@pytest.mark.parametrize("engine", ["zero2", "zero3_offload"])
def test_zero_is_looked_at_as_ddp_is(alone, engine):
    for name in ("held_out_loss", "ema_held_out_loss"):
        assert_close(logged(alone / engine, name), logged(alone / "ddp", name), **CLOSE)
    assert len(logged(alone / engine, "held_out_loss")) == 2
    assert (run_dir(alone / engine) / "samples" / "ema_progress.png").is_file()


@pytest.mark.parametrize("engines", ["zero3_offload_then_ddp", "ddp_then_zero2"])
def test_a_run_may_go_on_under_another_engine(alone, engines):
    assert_same(alone / engines, alone / "ddp")


# Two processes --------------------------------------------------------------------------------------------------------

EACH_ALONE = [*STEPS, "micro_batch_size=1", "memory=checkpointing"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """As `alone`, made by two processes; what one batch is made of is the same."""
    root = tmp_path_factory.mktemp("together")
    of = {name: partial(job, root / name) for name in ("fsdp2", "fsdp2_then_ddp", "ddp_then_fsdp2")}
    work(
        root,
        2,
        [
            of["fsdp2"]("fsdp2", *EACH_ALONE, *LOOKING),
            of["fsdp2_then_ddp"]("fsdp2", *EACH_ALONE, cut_off=3),
            of["fsdp2_then_ddp"]("ddp", *EACH_ALONE),
            of["ddp_then_fsdp2"]("ddp", *EACH_ALONE, cut_off=3),
            of["ddp_then_fsdp2"]("fsdp2", *EACH_ALONE),
        ],
    )
    return root


def test_fsdp2_in_two_processes_trains_what_one_trains(together, alone):
    assert_same(together / "fsdp2", alone / "ddp")
    assert_close(logged(together / "fsdp2", "grad_norm"), logged(alone / "ddp", "grad_norm"), **CLOSE)


def test_fsdp2_is_looked_at_as_ddp_is(together, alone):
    for name in ("held_out_loss", "ema_held_out_loss"):
        assert_close(logged(together / "fsdp2", name), logged(alone / "ddp", name), **CLOSE)


@pytest.mark.parametrize("engines", ["fsdp2_then_ddp", "ddp_then_fsdp2"])
def test_a_run_may_go_on_with_or_without_fsdp2(together, alone, engines):
    assert_same(together / engines, alone / "ddp")


@pytest.mark.slow
def test_zero_in_two_processes_trains_what_one_trains(tmp_path, alone):
    engines = ("zero2", "zero2_offload", "zero3_offload")
    cut = [job(tmp_path / f"{name}_then_on", name, *EACH_ALONE, cut_off=3) for name in engines]
    on = [job(tmp_path / f"{name}_then_on", name, *EACH_ALONE) for name in engines]
    work(tmp_path, 2, [*(job(tmp_path / name, name, *EACH_ALONE, *LOOKING) for name in engines), *cut, *on])
    for name in engines:
        assert_same(tmp_path / name, alone / "ddp")
        assert_same(tmp_path / f"{name}_then_on", alone / "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_full_training_in_bf16_is_that_of_ddp(tmp_path, processes):
    # Rounding to bf16 is by chance under DDP, and to the nearest of fp32 weights under DeepSpeed.
    full = ["lora=none", "model.torch_dtype=bfloat16", *STEPS, "micro_batch_size=1", "optimizer.lr=1e-4"]
    engines = {"ddp": [], "zero2": ["memory.trained_dtype=bfloat16"], "zero3_offload": ["memory=checkpointing"]}
    engines |= {"fsdp2": []} if processes == 2 else {}
    work(tmp_path, processes, [job(tmp_path / name, name, *full, *own) for name, own in engines.items()])
    for name in engines:
        assert_close(losses(tmp_path / name), losses(tmp_path / "ddp"), rtol=2e-3, atol=2e-3)
        assert_close(weights(tmp_path / name), weights(tmp_path / "ddp"), rtol=1e-2, atol=1e-3, check_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, processes):
    engines = ["ddp", "zero2", "zero2_offload", "zero3_offload", *(["fsdp2"] if processes == 2 else [])]
    work(tmp_path, processes, [job(tmp_path / name, name, *EACH_ALONE, poisoned=2) for name in engines])
    for name in engines:
        assert_same(tmp_path / name, tmp_path / "ddp")
        assert logged(tmp_path / name, "skipped_steps") == [1, 1, 1]
