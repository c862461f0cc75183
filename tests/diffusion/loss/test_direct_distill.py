"""Direct distillation: the student's whole rollout, as the guide's pseudocode has it, with its gradients."""

import pytest
import tiny
import torch
from torch.nn.functional import mse_loss

from diffsynth.cache.make import launch_data_process_task
from diffsynth.core.data import AddressedDataset, CachedDataset, Sample, UnifiedDataset
from diffsynth.core.data.dataset import Row
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.distillation.settings import Student
from diffsynth.diffusion.loss import DirectDistill, DirectDistillLoss
from diffsynth.diffusion.pipeline.units import run_units
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.training.accelerator import make_accelerator

HOW = {"rand_device": "cpu", "num_inference_steps": 3, "cfg_scale": 1}


def full(steps: int = 3) -> DirectDistill:
    return DirectDistill(trainable_models=["dit"], student=Student(num_inference_steps=steps))


@pytest.fixture
def sampled(rows):
    """The pictures, each with the seed it was sampled from."""
    return [Sample(Row({**row, **HOW, "seed": 7 + n}), epoch=0, index=n) for n, row in enumerate(rows)]


def written_out(pipe, row, steps: int) -> torch.Tensor:
    """The pseudocode: `mse_loss` between what the pipeline samples from the seed, gradients kept, and the picture."""
    image = row["image"]
    request = {"prompt": row["prompt"], "seed": row["seed"], "num_inference_steps": steps, "cfg_scale": 1}
    request = pipe.complete({**request, "height": image.height, "width": image.width})
    with pipe.sampling():
        pipe.set_timesteps(request)
        sides = run_units(pipe.units, pipe, *pipe.split_request(request))
        sampled = pipe.denoise.__wrapped__(pipe, *sides)
    return mse_loss(sampled, pipe.vae.encode(pipe.preprocess_image(image)))


def gradients(pipe, loss) -> dict[str, torch.Tensor]:
    pipe.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in pipe.dit.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_the_loss_is_that_of_the_pseudocode_and_so_are_its_gradients(training_module, sampled, steps, checkpointing):
    module = training_module(full(steps), checkpointing=checkpointing)
    sample = sampled[1]._replace(data=Row({**sampled[1].data, "num_inference_steps": steps}))
    expected = written_out(module.pipe, sample.data, steps)
    found = module([sample])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    wanted, own = gradients(module.pipe, expected), gradients(module.pipe, found[0])
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)
    assert sum(gradient.abs().sum() for gradient in own.values()) > 0


def test_a_batch_is_what_its_samples_are_alone(training_module, sampled):
    module = training_module(full())
    torch.testing.assert_close(
        module(sampled), torch.cat([module([sample]) for sample in sampled]), atol=1e-5, rtol=1e-5
    )


def test_the_noise_levels_of_other_objectives_come_back(training_module, sampled):
    module = training_module(full())
    before = module.pipe.scheduler.timesteps.clone()
    module(sampled)
    assert torch.equal(module.pipe.scheduler.timesteps, before) and module.pipe.scheduler.training


def test_numbers_may_be_text_as_in_a_csv(training_module, sampled):
    module = training_module(full())
    text = [s._replace(data=Row({**s.data, "seed": str(s.data["seed"]), "num_inference_steps": "3"})) for s in sampled]
    assert torch.equal(module(text), module(sampled))
    wrong = [s._replace(data=Row({**s.data, "seed": "seven"})) for s in sampled]
    with pytest.raises(ValueError, match="seed is 'seven', expected a whole number"):
        module(wrong)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("num_inference_steps", [3, 3, 4], "num_inference_steps is 4 .* is 3; set .*_steps=4"),
        ("cfg_scale", [4, 4, 4], "cfg_scale is 4; expected 1.*write 1"),
    ],
)
def test_what_no_rollout_can_be_made_of_is_named(training_module, sampled, column, values, message):
    samples = [s._replace(data=Row({**s.data, column: v})) for s, v in zip(sampled, values, strict=True)]
    with pytest.raises(ValueError, match=message):
        training_module(full())(samples)


def test_a_cache_gives_the_same_losses(tmp_path):
    folder = tiny.write_dataset(tmp_path / "data")
    sampled = [{"image": f"{n}.png", "prompt": f"a {n}", **HOW, "seed": n} for n in range(4)]
    rows = UnifiedDataset.from_folder(str(tiny.write_rows(folder, sampled)), height=32, width=32)
    configs = {name: ModelConfig(path=str(tiny.model() / part)) for name, part in tiny.COMPONENTS.items()}

    def losses(dataset, cached: bool):
        pipe = QwenImagePipeline.from_components(**configs, torch_dtype="float32")
        module = PipelineTrainingModule(
            pipe, DirectDistill(student=Student(num_inference_steps=3)), LoRA(rank=2, target_modules=["to_q"])
        )
        if dataset is None:
            return launch_data_process_task(make_accelerator("cpu", "float32"), rows, module, tmp_path / "cache")
        order, samples = dataset.order(4, seed=0), AddressedDataset(dataset)
        return module.load(cached=cached)([samples[order.sample(position)] for position in range(4)])

    losses(None, False)
    cached = losses(CachedDataset(str(tmp_path / "cache")), True)
    torch.testing.assert_close(cached, losses(rows, False), atol=1e-6, rtol=1e-6)


def test_it_is_called_like_the_originals_function(pipe, rows):
    pipe.scheduler.set_timesteps(1000, training=True)
    row = rows[1]
    size = {"height": row["image"].height, "width": row["image"].width}
    shared = {**pipe.call_defaults, **HOW, **size, "seed": 3, "input_image": row["image"]}
    shared, posi, _ = run_units(pipe.units, pipe, shared, {"prompt": row["prompt"]}, {"negative_prompt": ""})
    loss = DirectDistillLoss(pipe, **shared, **posi)
    torch.testing.assert_close(loss[0], written_out(pipe, {**row, "seed": 3}, 3), atol=1e-5, rtol=1e-5)
