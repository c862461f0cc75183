"""Fixtures of all tests: Qwen-Image in miniature with random weights, in a folder like the released one."""

import gc
import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared cores", deadline=None)  # a slow machine is no failure
settings.load_profile("shared cores")

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "models" / "emoji"

# Seconds that the longest files take (one idle core, 2026-11-30). They start first: no worker waits at the end.
SECONDS = {
    "benchmarks/test_gpu.py": 20,
    "training/test_runs.py": 67,
    "diffusion/template/test_template_training.py": 65,
    "config/test_options.py": 51,
    "plan/test_plan.py": 44,
    "training/engines/test_engines.py": 43,
    "training/test_resume.py": 40,
    "config/test_mistakes.py": 35,
    "cache/test_cache.py": 31,
    "plan/test_every_task.py": 31,
    "test_family_contract.py": 30,
    "pipelines/test_flux2_image.py": 28,
    "core/memory/test_storage.py": 27,
    "diffusion/adapters/test_lora.py": 25,
    "training/validation/test_few_steps.py": 21,
    "training/test_extension.py": 19,
    "pipelines/test_qwen_image_edit.py": 18,
    "scripts/test_distill_script.py": 17,
    "core/gradient/test_checkpointing.py": 17,
    "config/test_bad_input.py": 16,
    "training/test_debug.py": 16,
    "test_golden.py": 16,
    "config/test_slurm.py": 15,
    "training/validation/test_validation.py": 15,
    "pipelines/test_qwen_image.py": 14,
    "config/test_documented_commands.py": 14,
    "core/memory/test_streaming.py": 13,
    "diffusion/distillation/test_roles.py": 13,
    "training/record/test_data_report.py": 12,
    "diffusion/distillation/test_teacher.py": 12,
    "core/memory/test_compile.py": 11,
    "core/loader/test_loader.py": 10,
    "training/test_faults.py": 10,
    "plan/test_full_size.py": 8,
    "diffusion/template/test_template_flux2.py": 8,
    "scripts/test_generate.py": 8,
}


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none, and put the longest files first, as `--no-loadscope-reorder` keeps."""
    needs_gpu = [item for item in items if "cuda" in item.path.relative_to(ROOT / "tests").parts]
    if needs_gpu:
        import on_device  # here, because it imports torch
    for item in needs_gpu:
        item.add_marker("cuda")
        item.add_marker(pytest.mark.skipif(not on_device.is_present(), reason="there is no CUDA device"))
    items.sort(key=lambda item: -SECONDS.get(item.path.relative_to(ROOT / "tests").as_posix(), 0))


def pytest_collection_finish(session):
    """Let the garbage collector pass over what was imported, and run less often: an eighth of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture
def no_room():
    """A function that takes away the room on all disks, except for the first bytes of each file; None gives it back."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(but: int | None = 0) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if but is None else but, hard))

    yield limit
    limit(None)


@pytest.fixture
def no_weights_are_read(monkeypatch):
    """Reading the weights of a pipeline is an error in this test."""
    monkeypatch.setattr("diffsynth.diffusion.pipeline.networks.load_weights", None)


def import_file(path: Path):
    """Import a script outside of any package as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A model repository with random weights, where every parameter changes the output and latents have statistics."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    folder = tmp_path_factory.mktemp("tiny_qwen_image")
    import_file(EMBEDDED / "build.py").init(str(folder))
    generator = torch.Generator().manual_seed(0)
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    for parameter in transformer.parameters():  # the gates are zero, so that blocks would do nothing
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    transformer.save_pretrained(folder / "transformer")
    config = json.loads((folder / "vae" / "config.json").read_text())
    config["latents_mean"] = torch.randn(16, generator=generator).tolist()
    config["latents_std"] = (0.5 + torch.rand(16, generator=generator)).tolist()
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["random", *(["embedded"] if (EMBEDDED / "transformer").is_dir() else [])])
def repository(request, tiny) -> Path:
    """The repository with random weights, and the embedded one if it exists."""
    return {"random": tiny, "embedded": EMBEDDED}[request.param]


@pytest.fixture
def load_pipe():
    """`load_pipe(folder)` returns our pipeline in fp32."""
    import torch

    from diffsynth.pipelines.qwen_image import ModelConfig, QwenImagePipeline

    def load(folder: Path) -> QwenImagePipeline:
        pipe = QwenImagePipeline.from_pretrained(
            torch.float32,
            model_configs=[ModelConfig(path=folder / name) for name in ("transformer", "text_encoder", "vae")],
            tokenizer_config=ModelConfig(path=folder / "tokenizer"),
        )
        pipe.progress_bar = iter
        return pipe

    return load


@pytest.fixture
def pipe(tiny, load_pipe):
    """Our pipeline with random weights, fresh in each test."""
    return load_pipe(tiny)


@pytest.fixture
def training_module(tiny):
    """`training_module(task, lora)` returns a loaded training module of a pipeline with random weights."""
    from diffsynth.core.loader import ModelConfig
    from diffsynth.core.memory import MemoryRecipe
    from diffsynth.diffusion.loss import FlowMatchSFT
    from diffsynth.diffusion.training_defaults import TrainingDefaults
    from diffsynth.diffusion.training_module import PipelineTrainingModule
    from diffsynth.pipelines.qwen_image import QwenImagePipeline

    def build(task=None, lora=None, torch_dtype="float32", seed=0, **options) -> PipelineTrainingModule:
        folders = {"dit": "transformer", "text_encoder": "text_encoder", "vae": "vae", "tokenizer": "tokenizer"}
        pipe = QwenImagePipeline.from_components(
            **{name: ModelConfig(path=tiny / folder) for name, folder in folders.items()},
            torch_dtype=torch_dtype,
            training=TrainingDefaults(lora_target_modules={"dit": ["to_q", "to_k"]}),
        )
        pipe.progress_bar = iter
        return PipelineTrainingModule(pipe, task or FlowMatchSFT(), lora, seed, memory=MemoryRecipe(**options)).load()

    return build


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    """Three images, taller than wide, with prompts of different lengths."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 32, 3), dtype=np.uint8)
    prompts = ["", "a red apple", "a line emoji of a tiger face, looking at an umbrella"]
    from diffsynth.core.data import Row

    return [Row({"image": Image.fromarray(p), "prompt": text}) for p, text in zip(pixels, prompts, strict=True)]


@pytest.fixture(scope="session")
def samples(rows) -> list:
    """The rows at three addresses of a run."""
    from diffsynth.core.data import Sample

    return [Sample(row, epoch=index, index=10 + index) for index, row in enumerate(rows)]
