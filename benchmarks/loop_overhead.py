"""Times a training step of our loop against one of a bare loop with the same network, loss and optimizer.

    python benchmarks/loop_overhead.py

The model is one block of Qwen-Image's real width (3072) at 256², LoRA rank 32, AdamW, fp32. Both sides take turns in
one process, so that a machine that slows down slows both; the ratio is the median over neighbouring steps. Neither side
has units, encoders or reading of images: the difference is the loop itself.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.flow_match import interpolate
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.loss import FlowMatchSFT
from diffsynth.diffusion.training_module import DiffusionTrainingModule, prepare_training
from diffsynth.pipelines.qwen_image import QwenImagePipeline, pack_latents
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.loop import launch_training_task
from diffsynth.training.record.numbers import LocalLogger

STEPS = 12
SIDE = 32  # of latents; 256 pixels


class Prepared(torch.utils.data.Dataset):
    """A data set of one sample, as the pipeline's units would return it."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(0)
        return {
            "input_latents": torch.randn(1, 16, SIDE, SIDE, generator=generator),
            "prompt_emb": torch.randn(1, 20, 3584, generator=generator),
            "prompt_emb_mask": torch.ones(1, 20, dtype=torch.bool),
        }


class TurnTaking(DiffusionTrainingModule):
    """Takes a step of the bare loop before each step of our loop, and times both."""

    def __init__(self, pipe, bare_step):
        super().__init__()
        self.pipe, self.bare_step, self.task = pipe, bare_step, FlowMatchSFT()
        self.ours, self.bare, self.began = [], [], None

    def forward(self, data):
        now = time.perf_counter()
        if self.began is not None:
            self.ours.append(now - self.began)
        self.bare_step(data)
        self.began = time.perf_counter()
        self.bare.append(self.began - now)
        return self.task(self.pipe, **data)


def build(seed: int = 0) -> QwenImagePipeline:
    """Return a pipeline whose transformer is one block of the real width with a LoRA to train."""
    torch.manual_seed(seed)
    pipe = QwenImagePipeline(torch_dtype=torch.float32)
    pipe.dit = QwenImageTransformer2DModel(num_layers=1)
    prepare_training(pipe, [], LoRA(target_modules=["to_q", "to_k", "to_v", "to_out.0"]), seed)
    return pipe


def bare_step(dit, optimizer, scheduler):
    """Return a step as a textbook would write it."""
    parameters = [parameter for parameter in dit.parameters() if parameter.requires_grad]

    def step(data):
        clean, noise = data["input_latents"], torch.randn_like(data["input_latents"])
        index = torch.randint(0, 1000, (1,))
        noisy = interpolate(clean, noise, scheduler.sigmas[index])
        velocity = dit(
            hidden_states=pack_latents(noisy),
            timestep=scheduler.timesteps[index] / 1000,
            encoder_hidden_states=data["prompt_emb"],
            img_shapes=[[(1, SIDE // 2, SIDE // 2)]],
            return_dict=False,
        )[0]
        (velocity - pack_latents(noise - clean)).pow(2).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    ours, bare = build(), build()
    trainable = [parameter for parameter in bare.dit.parameters() if parameter.requires_grad]
    module = TurnTaking(ours, bare_step(bare.dit, torch.optim.AdamW(trainable, lr=1e-4), bare.scheduler))
    with tempfile.TemporaryDirectory() as folder:
        logger, saver = LocalLogger(folder, every=10), ModelLogger(Path(folder) / "weights", save_steps=10**9)
        accelerator = make_accelerator("cpu", "float32")
        launch_training_task(accelerator, Prepared(), module, saver, max_steps=STEPS, max_grad_norm=1.0, logger=logger)
    pairs = list(zip(module.ours, module.bare, strict=False))[2:]  # the first steps are a warm-up
    ratio = statistics.median(o / b for o, b in pairs)
    seconds = (statistics.median(side) for side in zip(*pairs, strict=True))
    print("median step: ours {:.3f} s, bare {:.3f} s; ratio {:.3f} over {} pairs".format(*seconds, ratio, len(pairs)))


if __name__ == "__main__":
    keep_console()
    main()
