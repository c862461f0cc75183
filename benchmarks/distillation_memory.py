"""Compares the peak memory of training several roles as adapters of one base with that of a plain LoRA training.

    python benchmarks/distillation_memory.py [--pixels 512] [--rank 32]

One of Qwen-Image's 60 blocks (width 3072, random weights, bf16, rank-32 adapters in fp32, AdamW) takes five optimizer
steps of one sample each; every kind runs in a process of its own. `sft` is FlowMatchSFT. `dmd2` trains a student and a
fake score, and calls the teacher twice for its guidance. The last kind gives the fake score a full copy of the block,
as DiffSynth-Studio does for each of the two other roles.
"""

import argparse
import json
import resource
import subprocess
import sys

from diffsynth.core.process.console import keep_console

KINDS = ("sft", "dmd2", "dmd2 with a full fake score")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(kind: str, pixels: int, rank: int) -> dict:
    import torch
    from accelerate import init_empty_weights
    from diffusers import QwenImageTransformer2DModel

    from diffsynth.core.data import SampleAddress
    from diffsynth.diffusion.adapters.lora import LoRA
    from diffsynth.diffusion.distillation.roles import FakeScore
    from diffsynth.diffusion.loss import DMD2, FlowMatchSFT, TrainProgress
    from diffsynth.diffusion.loss.base import MODEL
    from diffsynth.diffusion.randomness import SampleRNG
    from diffsynth.diffusion.training_module import DiffusionTrainingModule, prepare_training
    from diffsynth.pipelines.qwen_image import QwenImagePipeline
    from diffsynth.training.absent import NoEMA
    from diffsynth.training.accelerator import make_accelerator
    from diffsynth.training.state import TrainingState

    task = FlowMatchSFT() if kind == "sft" else DMD2(fake_score=FakeScore(full="full" in kind), student_every=2)
    lora = LoRA(rank=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0", "img_mlp.net.2", "txt_mlp.net.2"])

    class Training(DiffusionTrainingModule):
        def __init__(self):
            super().__init__()
            self.pipe = QwenImagePipeline(torch_dtype=torch.bfloat16)
            with init_empty_weights():
                dit = QwenImageTransformer2DModel(num_layers=1).to(torch.bfloat16)
            self.pipe.dit = dit.to_empty(device="cpu")
            for parameter in self.pipe.dit.parameters():
                torch.nn.init.normal_(parameter.data, std=0.02)
            prepare_training(self.pipe, [], lora, seed=0)
            self.roles = task.build_roles(self.pipe, lora, 0)
            self.networks = self.roles and self.roles.networks

        def trained_parts(self):
            named = {name: p for name, p in self.named_parameters() if p.requires_grad}
            others = self.roles.partition(named) if self.roles else {}
            apart = {name for part in others.values() for name in part}
            return {MODEL: {name: p for name, p in named.items() if name not in apart}, **others}

        def trained_at(self, step):
            return task.trained_at(step)

        def forward(self, step: int, progress: TrainProgress):
            side = pixels // 8
            text = torch.randn(1, 60, 3584, dtype=torch.bfloat16)
            inputs = {"input_latents": torch.randn(1, 16, side, side), "prompt_emb": text}
            inputs |= {"prompt_emb_mask": torch.ones(1, 60, dtype=torch.bool), "use_gradient_checkpointing": True}
            rng = SampleRNG(0, [SampleAddress(step, 0)])
            if self.roles is None:
                return task(self.pipe, rng=rng, **inputs)
            sides = {"roles": self.roles, "negative": {"prompt_emb": text.flip(1)}, "progress": progress}
            return task(self.pipe, rng=rng, height=pixels, width=pixels, **inputs, **sides)

    imported = peak_bytes()
    state = TrainingState(make_accelerator("cpu", "bfloat16"), Training(), torch.optim.AdamW, None, 5, NoEMA())
    for step in range(5):
        state.backward(state.losses(step))
        state.update(1.0)
    return {"peak": peak_bytes(), "above imports": peak_bytes() - imported}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--kind", choices=KINDS)
    arguments = parser.parse_args()
    if arguments.kind:
        return print(json.dumps(measure(arguments.kind, arguments.pixels, arguments.rank)))
    found = {}
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, "--pixels", str(arguments.pixels)]
        command += ["--rank", str(arguments.rank)]
        found[kind] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        ratios = {name: found[kind][name] / found["sft"][name] for name in found[kind]}
        print(
            f"{kind:28} peak {found[kind]['peak'] / 1e9:.2f} GB ({ratios['peak']:.2f} x sft), above the imports "
            f"{found[kind]['above imports'] / 1e9:.2f} GB ({ratios['above imports']:.2f} x sft)"
        )


if __name__ == "__main__":
    keep_console()
    main()
