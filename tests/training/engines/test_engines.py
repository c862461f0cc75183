"""DeepSpeed's ZeRO and FSDP2 train what DDP trains, and take up one another's runs."""

import json
import math
from pathlib import Path

import engine_jobs
import pytest
import tiny
import warm
import yaml
from engine_jobs import ENGINES
from safetensors.torch import load_file
from torch.testing import assert_close

from diffsynth.config import check
from diffsynth.diffusion.training_module import PipelineTrainingModule

pytestmark = pytest.mark.engines

CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
BF16 = ["model.torch_dtype=bfloat16"]
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
EVALUATING = [
    "validation=base",
    "validation.prompts=[a red emoji]",
    "validation.weights=[raw,ema]",
    "validation.options={num_inference_steps: 2, height: 32, width: 32}",
    "validation.loss_samples=3",
    "+validation.datasets.held_out={_target_: diffsynth.core.data.UnifiedDataset.from_folder, height: 32, width: 32}",
    f"+validation.datasets.held_out.path={tiny.dataset()}",
]


def job(folder: Path, engine: str, *overrides: str, **options) -> dict:
    return {"engine": engine, "overrides": tiny.merged(tiny.train_overrides(folder), overrides), **options}


def work(processes: int, jobs: list[dict]) -> None:
    """Do the jobs in `processes` processes, one after another."""
    assert warm.ranks(processes, engine_jobs.do, jobs) == [0] * processes


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
    """A folder of runs, a folder each by engine, that one process made."""
    root = tmp_path_factory.mktemp("alone")
    work(1, [job(root / name, name, *ACCUMULATION, *EVALUATING) for name in ("ddp", "zero3_offload")])
    return root


def assert_trained_and_evaluated_as_ddp(root: Path, ddp: Path) -> None:
    assert_same(root, ddp)
    for name in ("grad_norm", "held_out_loss", "ema_held_out_loss"):
        assert_close(logged(root, name), logged(ddp, name), **CLOSE)
    assert len(logged(root, "held_out_loss")) == 2
    assert (run_dir(root) / "samples" / "ema_progress.png").is_file()


def test_zero_trains_and_is_evaluated_as_ddp(alone):
    assert_trained_and_evaluated_as_ddp(alone / "zero3_offload", alone / "ddp")


@pytest.mark.slow
def test_so_does_zero_whose_weights_are_whole(tmp_path, alone):
    work(1, [job(tmp_path, "zero2", *ACCUMULATION, *EVALUATING)])
    assert_trained_and_evaluated_as_ddp(tmp_path, alone / "ddp")


@pytest.mark.slow
@pytest.mark.parametrize("engines", [("ddp", "zero2"), ("zero3_offload", "ddp"), ("zero2_offload", "zero3_offload")])
def test_a_run_may_go_on_under_any_engine(tmp_path, alone, engines):
    before, after = engines
    work(
        1,
        [job(tmp_path / "run", before, *ACCUMULATION, cut_off=3), job(tmp_path / "run", after, *ACCUMULATION)],
    )
    assert_same(tmp_path / "run", alone / "ddp")


# Two processes --------------------------------------------------------------------------------------------------------

EACH_ALONE = [*STEPS, "micro_batch_size=1", "memory=checkpointing"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """A folder of runs of two processes with samples, or tokens, of their own; cut off under DDP, FSDP2 goes on."""
    root = tmp_path_factory.mktemp("together")
    samples, tokens = (root / "samples", EACH_ALONE), (root / "tokens", [*ACCUMULATION, *EVALUATING])
    jobs = [job(samples[0], "ddp", *samples[1], cut_off=3), job(samples[0], "fsdp2", *samples[1])]
    jobs += [job(tokens[0], "ddp", *tokens[1], cut_off=3, split=True), job(tokens[0], "context_parallel", *tokens[1])]
    work(2, jobs)
    return root


def test_fsdp2_in_two_processes_trains_what_one_trains_and_takes_its_run_up(together, alone):
    assert_same(together / "samples", alone / "ddp")


@pytest.mark.slow
def test_fsdp2_is_evaluated_as_ddp_is_and_leaves_its_run_to_it(tmp_path, alone):
    run = tmp_path / "run"
    jobs = [job(run, "fsdp2", *EACH_ALONE, *EVALUATING, cut_off=3), job(run, "ddp", *EACH_ALONE, *EVALUATING)]
    work(2, [*jobs, job(tmp_path / "fsdp2", "fsdp2", *EACH_ALONE, *EVALUATING)])
    for root in (run, tmp_path / "fsdp2"):
        assert_same(root, alone / "ddp")
        assert_close(logged(root, "grad_norm"), logged(alone / "ddp", "grad_norm"), **CLOSE)
        for name in ("held_out_loss", "ema_held_out_loss"):
            assert_close(logged(root, name), logged(alone / "ddp", name), **CLOSE)


def test_two_processes_with_the_tokens_of_a_sample_train_what_one_trains(together, alone):
    assert_same(together / "tokens", alone / "ddp")
    for name in ("grad_norm", "held_out_loss", "ema_held_out_loss"):
        assert_close(logged(together / "tokens", name), logged(alone / "ddp", name), **CLOSE)


@pytest.mark.slow
def test_zero_in_two_processes_trains_what_one_trains(tmp_path, alone):
    engines = ("zero2", "zero2_offload", "zero3_offload")
    cut = [job(tmp_path / f"{name}_then_on", name, *EACH_ALONE, cut_off=3) for name in engines]
    on = [job(tmp_path / f"{name}_then_on", name, *EACH_ALONE) for name in engines]
    work(2, [*(job(tmp_path / name, name, *EACH_ALONE, *EVALUATING) for name in engines), *cut, *on])
    for name in engines:
        assert_same(tmp_path / name, alone / "ddp")
        assert_same(tmp_path / f"{name}_then_on", alone / "ddp")


@pytest.mark.slow
def test_tokens_are_split_under_zero_as_well(tmp_path, alone):
    engines = ("zero2", "zero3_offload")
    work(2, [job(tmp_path / name, name, *ACCUMULATION, *EVALUATING, split=True) for name in engines])
    for name in engines:
        assert_same(tmp_path / name, alone / "ddp")
        assert_close(logged(tmp_path / name, "held_out_loss"), logged(alone / "ddp", "held_out_loss"), **CLOSE)


COARSE = ["optimizer.lr=5e-2", "optimizer.eps=1e-4", "max_grad_norm=null"]  # larger updates than bf16 rounds away


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_full_training_in_bf16_is_that_of_ddp(tmp_path, processes):
    full = ["lora=none", "model.torch_dtype=bfloat16", *STEPS, "micro_batch_size=1", *COARSE]
    engines = {"ddp": [], "zero2": ["memory.trained_dtype=bfloat16"], "zero3_offload": ["memory=checkpointing"]}
    engines |= {"fsdp2": []} if processes == 2 else {}
    work(processes, [job(tmp_path / name, name, *full, *own) for name, own in engines.items()])
    moved = distance(weights(tmp_path / "ddp"), load_file(*(tiny.model() / "transformer").glob("*.safetensors")))
    for name in engines:
        assert_close(losses(tmp_path / name), losses(tmp_path / "ddp"), rtol=1e-2, atol=1e-2)
        assert distance(weights(tmp_path / name), weights(tmp_path / "ddp")) < 0.1 * moved


def distance(found: dict, expected: dict) -> float:
    return math.sqrt(sum((found[name].double() - expected[name].double()).square().sum() for name in expected))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_is_not_finite_is_skipped(tmp_path, processes):
    engines = ["ddp", "zero2", "zero2_offload", "zero3_offload", *(["fsdp2"] if processes == 2 else [])]
    work(processes, [job(tmp_path / name, name, *EACH_ALONE, poisoned=2) for name in engines])
    for name in engines:
        assert_same(tmp_path / name, tmp_path / "ddp")
        assert logged(tmp_path / name, "skipped_steps") == [1, 1, 1]


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """`refused(engine, *overrides)`: what is said of a run before any weight is read."""

    def refuse(engine: str, *overrides: str, deepspeed: dict | None = None, **environment: str) -> str:
        for name, value in {**ENGINES[engine], **environment}.items():
            monkeypatch.setenv(name, value)
        if deepspeed is not None:
            file = tmp_path / "deepspeed.json"
            file.write_text(json.dumps(json.loads(Path(ENGINES[engine][CONFIG_FILE]).read_text()) | deepspeed))
            monkeypatch.setenv(CONFIG_FILE, str(file))
        monkeypatch.setattr(PipelineTrainingModule, "load", lambda *_, **__: pytest.fail("reads weights"))
        with pytest.raises(ValueError) as error:
            tiny.train(tmp_path, *overrides)
        return str(error.value)

    return refuse


BLOCKS = "memory=checkpointing"


def test_several_optimizers_are_refused_with_the_way_out(refused):
    said = refused("zero2", "task=distill/dmd2", "task.teacher=null", "task.student.num_inference_steps=2")
    assert "several roles" in said and "conf/accelerate/ddp.yaml" in said


@pytest.mark.parametrize("engine", ["zero2", "zero3_offload", "fsdp2"])
@pytest.mark.parametrize("optimizer", ["prodigy", "schedule_free"])
def test_optimizers_that_read_whole_tensors_are_refused(refused, engine, optimizer):
    assert "choose optimizer=adamw" in refused(engine, BLOCKS, f"optimizer={optimizer}")


@pytest.mark.parametrize(
    "said, deepspeed",
    [
        (
            "gradient_accumulation_steps: 3, but batch_size and micro_batch_size make it 2",
            {"gradient_accumulation_steps": 3},
        ),
        ("gradient_clipping: 0.5, but max_grad_norm is 1", {"gradient_clipping": 0.5}),
        ("section 'optimizer'", {"optimizer": {"type": "Adam"}}),
        ("section 'scheduler'", {"scheduler": {"type": "WarmupLR"}}),
        ("memory.checkpointing=blocks", {"activation_checkpointing": {}}),
        ("enables bf16, but model.torch_dtype is float32", {"bf16": {"enabled": True}}),
        ("enables fp16", {"fp16": {"enabled": True}}),
        ("reduce_bucket_size: auto", {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}),
        ("offload to cpu", {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}),
    ],
)
def test_a_deepspeed_file_that_says_otherwise_is_refused(refused, said, deepspeed):
    assert said in refused("zero2", "micro_batch_size=2", "memory=none", deepspeed=deepspeed)


def test_another_precision_in_the_launchers_file_is_refused(refused):
    assert "model.torch_dtype is float32" in refused("ddp", ACCELERATE_MIXED_PRECISION="bf16")


def test_a_launcher_for_gpus_is_not_for_a_cpu(refused, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    said = refused("ddp", ACCELERATE_MIXED_PRECISION="no", LOCAL_RANK="0")
    assert "starts processes for GPUs, but device is cpu" in said


@pytest.mark.parametrize("name", ["tp_size", "sp_size", "dp_replicate_size"])
def test_splitting_anything_but_tokens_is_refused(refused, name):
    split = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", f"PARALLELISM_CONFIG_{name.upper()}": "2"}
    assert f"parallelism_config_{name} is 2; leave it out" in refused("ddp", **split)


def test_tokens_are_split_over_a_divisor_of_the_processes(refused):
    assert "cp_size is 2, which does not divide its 1 processes" in refused("context_parallel")


@pytest.mark.parametrize(
    "overrides, said",
    [
        ([], "4 heads, which cp_size=3 does not divide; set cp_size to one of [2, 4]"),
        (["memory.compile=blocks"], "which cannot be compiled"),
        (["task=distill/add", "task.teacher=null"], "discriminator of AdversarialDistillation reads all tokens"),
        (["task=autoencoder", "lora=none"], "calls no network"),
    ],
)
def test_what_tokens_cannot_be_split_for_is_refused(refused, monkeypatch, overrides, said):
    monkeypatch.setattr("diffsynth.training.engines.asked_cp_size", lambda processes: 3)
    monkeypatch.setattr("diffsynth.training.engines.Engine.replicas", 1)
    monkeypatch.setattr("diffsynth.plan.preflight.is_small", lambda *_: True)
    assert said in refused("ddp", *overrides)


def test_fsdp2_says_what_it_cannot_train(refused):
    assert "trained_dtype=float32" in refused("fsdp2", "lora=none", "memory.trained_dtype=bfloat16", *BF16)
    assert "text_encoder" in refused("fsdp2", "lora=none", "task.trainable_models=[dit,text_encoder]")
    assert "fsdp_version: 2" in refused("fsdp2", FSDP_VERSION="1")


def test_the_launchers_files_are_those_that_engines_are_tested_with():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (tiny.ROOT / "conf" / "accelerate").glob("*.yaml")}
    assert files.keys() == ENGINES.keys()
    for name, file in files.items():
        deepspeed = f"conf/accelerate/{name}.json" if name.startswith("zero") else None
        assert file.get("deepspeed_config", {}).get("deepspeed_config_file") == deepspeed


def test_the_recipe_for_little_memory_composes():
    cfg = tiny.compose("train", "experiment=qwen_image/low_vram")
    check(cfg, tiny.schema("train"))
    assert cfg.memory.checkpointing == "blocks" and cfg.model.text_encoder is None
