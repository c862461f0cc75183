"""Commands of DiffSynth-Studio become ours, and nothing of them is lost without a word."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import WanVACETransformer3DModel
from studio_commands import CASES, LORA, MANY_FLAGS, QWEN, TWO_EXPERTS, Case, launch, wan

from diffsynth.config import check
from diffsynth.diffusion.adapters.lora import find_layers
from diffsynth.importing.__main__ import main
from diffsynth.importing.flags import FLAGS
from diffsynth.importing.ours import OurCommand, OurStatement
from diffsynth.importing.parsing import read_commands
from diffsynth.importing.printing import printed
from diffsynth.importing.translate import translate


def written(case: Case, folder: Path) -> Path:
    (folder / case.name).write_text(case.text, encoding="utf-8")
    return folder / case.name


def translated(case: Case, folder: Path, **options) -> list[OurCommand]:
    return [each for statement in translate(written(case, folder), **options) for each in statement.commands]


def said(ours: OurCommand) -> set[str]:
    """The flags that a command has no word for, but a line."""
    flags = [flag for lists in (ours.left_out, ours.refused) for names in lists.values() for flag in names]
    return {*flags, *(text.removeprefix("--").split()[0] for text in ours.unknown)}


@pytest.mark.parametrize("name", tiny.mostly_slow(CASES, "lora", "many_flags", "two_experts"))
def test_each_command_becomes_one_of_ours(name, tmp_path):
    case = CASES[name]
    ours = translated(case, tmp_path)
    assert [[*each.words, *each.overrides] for each in ours] == [shlex.split(line) for line in case.ours]
    assert set().union(*map(said, ours)) == case.said


def test_the_cases_have_every_flag_of_the_table(tmp_path):
    found = [each for case in CASES.values() for each in read_commands(written(case, tmp_path))]
    given = {flag.removeprefix("dmd2_") for each in found for command in each.commands for flag in command.flags}
    assert FLAGS.keys() <= given


def commands_in(script: str) -> list[tuple[str, list[str]]]:
    """The (entry, overrides) of each command of ours in a shell script."""
    lines = [line for line in script.replace("\\\n", "").splitlines() if ".py " in line and not line.startswith("#")]
    words = [shlex.split(line) for line in lines]
    starts = [next(number for number, word in enumerate(line) if word.endswith(".py")) for line in words]
    return [(line[start].removesuffix(".py"), line[start + 1 :]) for line, start in zip(words, starts, strict=True)]


def without_what_is_refused(ours: list[OurStatement]) -> list[OurCommand]:
    """The commands that remain for someone who decides to do without it."""
    return [replace(command, refused={}, unknown=[]) for each in ours for command in each.commands]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", tiny.mostly_slow(CASES, "lora", "two_experts"))
def test_every_printed_command_composes(name, exact, tmp_path):
    ours = translate(written(CASES[name], tmp_path), exact=exact)
    assert len(commands_in(printed(ours))) == sum(each.is_complete for each in translated(CASES[name], tmp_path))
    found = commands_in(printed([OurStatement([each]) for each in without_what_is_refused(ours)]))
    assert len(found) == len(CASES[name].ours)
    for entry, overrides in found:
        check(tiny.compose(entry, *overrides), tiny.schema(entry))


def test_layers_of_wan_are_those_of_the_part_that_is_trained(tmp_path):
    """Their model `vace` is a part of our network, whose other blocks have layers of the same names."""
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 1, "text_dim": 8}
    with torch.device("meta"):
        dit = WanVACETransformer3DModel(**sizes, vace_layers=[0])
    for base, block in (("dit", "blocks.0"), ("vace", "vace_blocks.0")):
        (ours,) = translated(Case(wan("Wan2.1-VACE-1.3B", base=base, targets="q,o"), []), tmp_path)
        targets = tiny.compose("train", *ours.overrides).lora.target_modules
        expected = {f"{block}.attn{number}.{name}" for number in "12" for name in ("to_q", "to_out.0")}
        assert {*find_layers(dit, targets, "dit")} == expected


def test_what_is_not_printed_is_the_default_already(tmp_path):
    (ours,) = translated(LORA, tmp_path)
    cfg = tiny.compose("train", *ours.overrides)
    assert (cfg.lora.rank, cfg.lora.models, cfg.optimizer.lr, cfg.optimizer.weight_decay) == (32, ["dit"], 1e-4, 0.01)
    assert (cfg.dataset.max_pixels, cfg.dataset.height, cfg.micro_batch_size) == (1048576, None, 1)
    assert (cfg.memory.checkpointing, cfg.model.dit.model_id) == ("blocks", "Qwen/Qwen-Image")


def test_exact_imitates_what_can_be_imitated(tmp_path):
    (plain,), (exact,) = translated(LORA, tmp_path), translated(LORA, tmp_path, exact=True)
    assert set(exact.overrides) - set(plain.overrides) == {
        "max_grad_norm=null",
        "task.exact_upstream=true",
        "lr_scheduler._target_=torch.optim.lr_scheduler.ConstantLR",
    }
    assert len(plain.differs) - len(exact.differs) == 3
    (parallel,) = translated(MANY_FLAGS, tmp_path, exact=True)
    assert "+lr_scheduler.total_iters=3" in parallel.overrides  # theirs counts 5 steps of 2 processes together


@pytest.mark.slow
def test_the_exact_schedule_begins_with_five_steps_at_a_third(tmp_path):
    import json

    (exact,) = translated(LORA, tmp_path, exact=True)
    schedule = [word for word in exact.overrides if word.startswith(("lr_scheduler", "max_grad_norm", "task."))]
    run_dir = tiny.train(tmp_path, *schedule, "max_steps=7", "optimizer.lr=3e-4", "checkpoint.every=null")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([1e-4] * 5 + [3e-4] * 2)


def test_a_family_is_known_as_soon_as_its_file_is_there(tmp_path):
    project = tmp_path / "project"
    shutil.copytree(tiny.ROOT / "conf", project / "conf")
    models = project / "conf" / "model"
    for file in models.glob("wan*.yaml"):
        file.unlink()
    before = translated(TWO_EXPERTS, tmp_path, project=project)
    text = "defaults: [qwen_image]\ndit: {model_id: Wan-AI/Wan2.2-T2V-A14B-Diffusers}\n"
    (models / "wan.yaml").write_text(text, encoding="utf-8")
    after = translated(TWO_EXPERTS, tmp_path, project=project)
    assert all("the family Wan has no file in conf/model/ yet" in each.problem for each in before)
    assert [each.problem for each in after] == ["", ""]
    boundaries = [[word for word in each.overrides if "_boundary" in word] for each in after]
    assert boundaries == [["task.timesteps.max_boundary=0.417"], ["task.timesteps.min_boundary=0.417"]]
    assert not any(word.startswith("model.") for each in after for word in each.overrides)  # their files are others


def test_a_model_that_cannot_be_inferred_is_asked_for(tmp_path):
    encoder = "black-forest-labs/FLUX.2-klein-4B:text_encoder/*"
    (ours,) = translated(Case(launch("flux2", model_id_with_origin_paths=encoder), []), tmp_path)
    assert "flux2_klein_4b, flux2_klein_base_4b have these files; type one of them, model=…" in ours.problem
    unnamed = Case(launch("qwen_image", dataset_base_path="d", lora_base_model="dit"), [])
    (ours,) = translated(unnamed, tmp_path)
    assert "type the model behind the file, such as model=qwen_image" in ours.problem
    (ours,) = translated(unnamed, tmp_path, model="qwen_image")
    assert not ours.problem and ours.overrides[0] == "model=qwen_image"
    with pytest.raises(ValueError, match="model=wan: there is no such model; expected one of .*flux2_dev"):
        translated(unnamed, tmp_path, model="wan")


def test_a_command_that_would_train_nothing_of_theirs_is_not_printed(tmp_path):
    flags = {"model_id_with_origin_paths": QWEN, "trainable_models": "blockwise_controlnet"}
    (ours,) = translated(Case(launch("qwen_image", dataset_base_path="d", **flags), []), tmp_path)
    assert ours.problem.startswith("--trainable_models: qwen_image has no component blockwise_controlnet to train yet")
    assert commands_in(printed([OurStatement([ours])])) == []


def test_what_we_refuse_is_named_with_what_to_do(tmp_path, capsys):
    status = main([str(written(MANY_FLAGS, tmp_path))])
    text = capsys.readouterr().out
    assert status == 1
    assert "--noise_scale: the noise of the training has the scale 1 here; leave it out" in text
    assert "--extra_inputs: qwen_image has no input layer_input_image yet" in text
    assert "#   --made_up 3" in text
    assert main([str(written(LORA, tmp_path))]) == 0
    text = capsys.readouterr().out
    assert text.startswith("modelscope download --dataset DiffSynth-Studio/diffsynth_example_dataset")
    assert "theirs a third of it" in text and "type batch_size=N" in text


WEIGHTS = f"--model_id_with_origin_paths '{QWEN}' --lora_base_model dit"
TRAINING = f"accelerate launch train.py --dataset_base_path d {WEIGHTS}"


@pytest.mark.parametrize(
    "text, said",
    [
        (TRAINING.replace("path d", "path $DATA"), "--dataset_base_path: the shell puts another text into $DATA"),
        (f"{TRAINING} --output_path `date`", "--output_path: the shell puts another text into `date`"),
        (f"for lr in 1 2; do\n  {TRAINING} --learning_rate $lr\ndone", "--learning_rate: the shell puts another"),
        (f"{TRAINING} --made_up 3 2>&1 | tee log", "--made_up 3"),
        (
            f"{TRAINING} && python examples/validate.py",
            "Not possible yet: examples/validate.py is a Python script that",
        ),
        (
            "python train.py --foo",
            "Not possible yet: the command names no weights; if it is one of DiffSynth-Studio's, type",
        ),
        (f"{TRAINING} --gradient_accumulation_steps two", "--gradient_accumulation_steps is 'two'; expected a whole"),
        (TRAINING.replace("train.py", "train.py stray"), "Not possible yet: 'stray' after"),
    ],
)
def test_a_command_that_would_do_something_else_than_theirs_is_a_comment(text, said, tmp_path, capsys):
    assert main([str(written(Case(f"{text}\n{TRAINING}", []), tmp_path))]) == 1
    *before, last = capsys.readouterr().out.partition("# What differs")[0].strip().partition("\naccelerate launch")
    assert all(line.startswith("#") or not line for line in before[0].splitlines()) and said in before[0]
    assert "model=qwen_image" in last


def test_what_differs_is_said_of_its_command(tmp_path):
    text = f"cd a && {TRAINING}\n{TRAINING} --seed 42\n{TRAINING} --save_steps 2"
    lines = printed(translate(written(Case(text, []), tmp_path))).splitlines()
    assert any(
        line.startswith("#   Command 1 of 3: cd a is left out: start the command in the folder") for line in lines
    )
    assert any(line.startswith("#   Commands 1, 3 of 3: Samples, noise and timesteps follow") for line in lines)
    assert "#   Weights are trained in fp32, theirs in bf16." in lines and "    seed=42 \\" in lines


CONTROL = ",".join(
    [
        *(f"Tongyi-MAI/Z-Image-Turbo:{name}/x.safetensors" for name in ("transformer", "text_encoder")),
        "a/ControlNet:b.st",
    ]
)


@pytest.mark.parametrize("trained", [{"trainable_models": "controlnet"}, {"lora_base_model": "dit"}])
def test_a_controlnet_of_a_transformer_without_an_option_takes_the_option_of_its_pipeline(trained, tmp_path):
    flags = {"model_id_with_origin_paths": CONTROL, "extra_inputs": "controlnet_image", **trained}
    (ours,) = translated(Case(launch("z_image", dataset_base_path="d", **flags), []), tmp_path)
    assert ours.is_complete and ours.overrides[0] == "model=z_image_controlnet"
    assert {"model.dit.model_id=Tongyi-MAI/Z-Image-Turbo", "model.controlnet.model_id=a/ControlNet"} < {*ours.overrides}
    flags["model_id_with_origin_paths"] = CONTROL.rpartition(",")[0]
    (alone,) = translated(
        Case(launch("z_image", dataset_base_path="d", **{**flags, "lora_base_model": "dit"}), []), tmp_path
    )
    assert any("has no input controlnet_image" in why for why in alone.refused)


def test_the_mask_of_flux_fill_has_our_name(tmp_path):
    files = "black-forest-labs/FLUX.1-Fill-dev:flux1-fill-dev.safetensors"
    keys = {"data_file_keys": "image,flux_fill_image,flux_fill_mask", "extra_inputs": "flux_fill_image,flux_fill_mask"}
    flags = {"model_id_with_origin_paths": files, "lora_base_model": "dit", **keys}
    (ours,) = translated(Case(launch("flux", dataset_base_path="d", **flags), []), tmp_path)
    assert ours.is_complete and any("rename it in the table" in how for how in ours.differs)
    cfg = tiny.compose("train", *ours.overrides)
    assert cfg.task.extra_inputs == ["inpaint_mask"] and cfg.dataset.data_file_keys == ["image", "inpaint_mask"]


@pytest.mark.parametrize("value", ["0", "2.5", "thirty"])
def test_a_value_that_our_check_refuses_makes_no_command(value, tmp_path):
    (ours,) = translated(replace(LORA, text=LORA.text.replace('"32"', value).replace("'32'", value)), tmp_path)
    assert ours.problem.startswith("lora.rank is ") and not ours.is_complete
    assert commands_in(printed([OurStatement([ours])])) == []


@pytest.mark.parametrize(
    "arguments, error",
    [
        ([], "nothing is typed; expected FILE.sh [model=…] [exact=true]."),
        (["a.sh", "b.sh"], "a.sh b.sh is typed; expected FILE.sh"),
        (["a.sh", "exakt=true"], "a.sh exakt=true is typed; expected FILE.sh"),
        (["a.sh", "exact=yes"], "a.sh exact=yes is typed; expected FILE.sh"),
    ],
)
def test_a_mistaken_command_line_is_answered_with_the_right_one(arguments, error):
    with pytest.raises(ValueError) as raised:
        main(arguments)
    assert str(raised.value).startswith(error)


@pytest.mark.slow
def test_a_mistake_is_one_line_of_the_command_line(tmp_path):
    said = tiny.process("python", "-m", "diffsynth.importing", str(tmp_path / "absent.sh"), status=1)
    assert said.startswith(f"error: {tmp_path}/absent.sh does not exist; expected a script") and said.count("\n") == 1
