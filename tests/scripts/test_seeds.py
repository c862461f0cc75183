"""The code that the seeds print runs as printed, in a folder that holds the model and the data set it names."""

import runpy
import shutil

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

# seeds/supervised_fine_tuning.md: its code blocks, one after the other, below the imports that its text names.
TRAINING_SCRIPT = """
import accelerate
import torch

from diffsynth.core.data import UnifiedDataset
from diffsynth.diffusion import launch_training_task
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.loss import FlowMatchSFTLoss
from diffsynth.diffusion.training_module import DiffusionTrainingModule
from diffsynth.pipelines.qwen_image import ModelConfig, QwenImagePipeline


class QwenImageTrainingModule(DiffusionTrainingModule):
    def __init__(self, device):
        super().__init__()
        # Load the pipeline
        self.pipe = QwenImagePipeline.from_pretrained(
            torch_dtype=torch.bfloat16,
            device=device,
            model_configs=[
                ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors"),
                ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model*.safetensors"),
                ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
            ],
            tokenizer_config=ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/"),
        )
        # Switch to training mode
        self.switch_pipe_to_training_mode(
            self.pipe,
            lora_base_model="dit",
            lora_target_modules="to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj",
            lora_rank=32,
        )

    def forward(self, data):
        # Preprocess
        inputs_posi = {"prompt": data["prompt"]}
        inputs_nega = {"negative_prompt": ""}
        inputs_shared = {
            # Assume you are using this pipeline for inference,
            # please fill in the input parameters.
            "input_image": data["image"],
            "height": data["image"].size[1],
            "width": data["image"].size[0],
            # Please do not modify the following parameters
            # unless you clearly know what this will cause.
            "cfg_scale": 1,
            "rand_device": self.pipe.device,
            "use_gradient_checkpointing": True,
            "use_gradient_checkpointing_offload": False,
        }
        for unit in self.pipe.units:
            inputs_shared, inputs_posi, inputs_nega = self.pipe.unit_runner(unit, self.pipe, inputs_shared, inputs_posi, inputs_nega)
        # Loss
        loss = FlowMatchSFTLoss(self.pipe, **inputs_shared, **inputs_posi)
        return loss


if __name__ == "__main__":
    accelerator = accelerate.Accelerator(
        kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    dataset = UnifiedDataset(
        base_path="data/example_image_dataset",
        metadata_path="data/example_image_dataset/metadata.csv",
        repeat=50,
        data_file_keys="image",
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path="data/example_image_dataset",
            height=512,
            width=512,
            height_division_factor=16,
            width_division_factor=16,
        )
    )
    model = QwenImageTrainingModule(accelerator.device)
    model_logger = ModelLogger(
        output_path="models/toy_model",
        remove_prefix_in_ckpt="pipe.dit.",
    )
    launch_training_task(
        accelerator, dataset, model, model_logger,
        learning_rate=1e-5, num_epochs=1,
    )
"""  # noqa: E501

# seeds/direct_distill.md
DRAWING_SCRIPT = """
from diffsynth.pipelines.qwen_image import QwenImagePipeline, ModelConfig
import torch
pipe = QwenImagePipeline.from_pretrained(
    torch_dtype=torch.bfloat16,
    device="cuda",
    model_configs=[
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="transformer/diffusion_pytorch_model*.safetensors"),
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="text_encoder/model*.safetensors"),
        ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="vae/diffusion_pytorch_model.safetensors"),
    ],
    tokenizer_config=ModelConfig(model_id="Qwen/Qwen-Image", origin_file_pattern="tokenizer/"),
)
prompt = "精致肖像,水下少女,蓝裙飘逸,发丝轻扬,光影透澈,气泡环绕,面容恬静,细节精致,梦幻唯美。"
image = pipe(prompt, seed=0, num_inference_steps=40)
image.save("image.jpg")
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script, with some of its text changed, where the model and the data set it names are tiny ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "1")
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    shutil.copytree(tiny.model(), tmp_path / "models" / "Qwen" / "Qwen-Image")
    tiny.write_dataset(tmp_path / "data" / "example_image_dataset", count=1)

    def script(text: str, changes: dict[str, str]) -> None:
        for printed, changed in changes.items():
            assert printed in text
            text = text.replace(printed, changed)
        (tmp_path / "script.py").write_text(text, encoding="utf-8")
        runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")

    return script


@pytest.mark.parametrize("changes", [{"repeat=50": "repeat=2", "512": "64"}, pytest.param({}, marks=pytest.mark.slow)])
def test_the_training_script_trains_and_saves_an_epoch(changes, run, tmp_path):
    run(TRAINING_SCRIPT, changes)
    weights = load_file(tmp_path / "models" / "toy_model" / "epoch-0.safetensors")
    pair = [weights[f"transformer_blocks.0.attn.to_q.lora_{side}.default.weight"] for side in "AB"]
    assert [tuple(matrix.shape) for matrix in pair] == [(32, 128), (128, 32)]
    assert all(torch.count_nonzero(matrix) for matrix in pair)


def test_the_sampling_script_samples_an_image(run, tmp_path):
    run(DRAWING_SCRIPT, {'"cuda"': '"cpu"', "num_inference_steps=40": "num_inference_steps=2, height=64, width=64"})
    assert Image.open(tmp_path / "image.jpg").size == (64, 64)
