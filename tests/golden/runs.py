"""Short runs of every task, and their results: losses, exported tensors, cache keys, sampled latents.

`python tests/golden/runs.py record` writes them to `record.json`; `… check` compares them with it to the last bit,
which holds on the machine that recorded them. `test_golden.py` compares one curve per task on any machine, with a
tolerance.
"""

import csv
import hashlib
import json
import logging
import os
import runpy
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("record.json")
SHORT = [
    "device=cpu",
    "max_steps=3",
    "batch_size=4",
    "logger.every=1",
    "validation=none",
    "export.save_steps=3",
    "export.formats=[diffusers]",  # the record has digests of these names
    "lr_scheduler=constant",
]
DISTILL = ["prompts.seeds=1", "held_out=null", "task.teacher.num_inference_steps=6", "optimizer.lr=1e-3"]
FLUX2_EDIT = ["model=emoji_flux2", "dataset.path={data}", "dataset.metadata=edit.csv", "task.extra_inputs=[edit_image]"]
TEMPLATE = ["lr_scheduler.num_decay_steps=1", "lr_scheduler.num_warmup_steps=1", "validation.loss_samples=2"]


def distillation(method: str, *more: str) -> tuple[str, list[str]]:
    return "distill", [f"experiment=emoji_distill/{method}", *SHORT, *DISTILL, *more]


# Name → entry script and its arguments; {folder} is a folder of its own, {data} what `write_data` makes.
RUNS: dict[str, tuple[str, list[str]]] = {
    "default": ("train", [*SHORT, "optimizer.lr=5e-3"]),
    "full": ("train", [*SHORT, "lora=none", "optimizer.lr=1e-3"]),
    "flux2": ("train", [*SHORT, "model=emoji_flux2"]),
    "flux2_edit": ("train", [*SHORT, *FLUX2_EDIT, "dataset.data_file_keys=[image,edit_image]", "micro_batch_size=1"]),
    "autoencoder": (
        "train",
        [*SHORT, "task=autoencoder", "lora=none", "dataset.metadata=color_train.csv", "optimizer.lr=1e-3"],
    ),
    "template": ("train", ["experiment=emoji_template/brightness", *SHORT[:4], *TEMPLATE]),
    "logit_normal": ("train", [*SHORT, "timesteps=logit_normal", "weighting=uniform", "lora=dora"]),
    "buckets": (
        "train",
        [
            *SHORT,
            "dataset.path={data}",
            "dataset.metadata=null",
            "dataset.buckets=true",
            "max_steps=4",
            "dataset.height=null",
            "dataset.width=null",
            "dataset.max_pixels=4096",
            "dataset.augmentation.flip=0.5",
            "dataset.augmentation.caption_dropout=0.3",
        ],
    ),
    "mixed": (
        "train",
        [
            *SHORT,
            "dataset=mixed",
            "+dataset@dataset.datasets.line=emoji",
            "+dataset@dataset.datasets.flat=emoji",
            "dataset.datasets.flat.metadata=flat_train.csv",
            "dataset.weights={line: 2.0, flat: 0.5}",
        ],
    ),
    "accumulated": ("train", [*SHORT, "micro_batch_size=2", "ema=power", "memory=checkpointing", "lora.dropout=0.1"]),
    "cache": ("make_cache", ["device=cpu", "dataset.path={data}", "dataset.metadata=null", "path={folder}/cache"]),
    "cached": ("train", [*SHORT, "dataset=cache", "dataset.path={folder}/../cache/cache"]),
    "direct": distillation("direct"),
    "trajectory": distillation("trajectory"),
    "dmd2": distillation("dmd2", "task.student_every=2"),
    "add": distillation("add"),
    "hyper_sd": distillation("hyper_sd"),
    "lcm": distillation("lcm"),
}
REQUESTS = {
    "emoji": {"prompt": "a color emoji of rocket", "seed": 0, "num_inference_steps": 4, "cfg_scale": 3.0},
    "emoji_flux2": {"prompt": "a color emoji of owl", "seed": 1, "num_inference_steps": 4, "cfg_scale": 2.0},
}


def write_data(folder: Path) -> Path:
    """Write eight images of different shapes with captions, and four prompts."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader((ROOT / "data/emoji/color_train.csv").open(encoding="utf-8")))[:8]
    for number, row in enumerate(rows):
        size = [(64, 64), (96, 64), (64, 80)][number % 3]
        picture = Image.open(ROOT / "data/emoji" / row["image"]).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        Image.alpha_composite(white, picture).convert("RGB").resize(size).save(folder / f"{number}.png")
    write_csv(folder / "metadata.csv", [{"image": f"{n}.png", "prompt": r["prompt"]} for n, r in enumerate(rows)])
    others = [
        {"image": f"{n}.png", "edit_image": f"{(n + 1) % 8}.png", "prompt": r["prompt"]} for n, r in enumerate(rows)
    ]
    write_csv(folder / "edit.csv", others)
    write_csv(folder / "prompts.csv", [{"prompt": row["prompt"]} for row in rows[:4]])
    return folder


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def run(name: str, folder: Path) -> dict:
    """Run one of `RUNS` in this process, and return its results."""
    entry, arguments = RUNS[name]
    own, data = folder / name, folder / "data"
    given = [word.replace("{folder}", str(own)).replace("{data}", str(data)) for word in arguments]
    if entry != "make_cache":
        given += [f"output_root={own}", "name=golden"]
    if entry == "distill":
        given += [f"teacher_path={own}/teacher", f"prompts.path={data}/prompts.csv"]
    command(entry, given)
    if entry == "make_cache":
        return {"keys": cache_keys(own / "cache")}
    (run_dir,) = own.glob("golden-*")
    found = {"losses": losses(run_dir), "tensors": tensor_digests(run_dir / "weights")}
    return found | ({"keys": cache_keys(own / "teacher/train")} if entry == "distill" else {})


def command(entry: str, arguments: list[str]) -> None:
    """Run `python <entry>.py <arguments>` in this process."""
    from hydra.core.global_hydra import GlobalHydra

    os.chdir(ROOT)
    handlers, level, argv = logging.root.handlers[:], logging.root.level, sys.argv
    sys.argv = [str(ROOT / f"{entry}.py"), *arguments]
    GlobalHydra.instance().clear()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        logging.root.handlers[:], sys.argv = handlers, argv
        logging.root.setLevel(level)


def losses(run_dir: Path) -> list[dict[str, float]]:
    """The losses of every step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name.endswith("loss")} for line in lines]


def tensor_digests(folder: Path) -> dict[str, str]:
    """A digest and the norm of the tensors of every exported file."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        digest, norm = hashlib.blake2b(digest_size=8), 0.0
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
            norm += tensor.double().pow(2).sum().item()
        found[path.name] = f"{digest.hexdigest()} {norm**0.5:.6g}"
    return found


def cache_keys(folder: Path) -> str:
    """A digest of the keys of a cache's entries."""
    with sqlite3.connect(folder / "index.sqlite") as connection:
        keys = sorted(key for (key,) in connection.execute("SELECT key FROM entries"))
    return f"{len(keys)} {hashlib.blake2b(json.dumps(keys).encode(), digest_size=8).hexdigest()}"


def sampled(model: str) -> str:
    """A digest of the latents that a shipped model samples, and their norm."""
    import hydra
    import torch

    from diffsynth.config import build

    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("generate", overrides=[f"model={model}", "device=cpu"])
    pipe = build(cfg)["model"](device="cpu")
    pipe.load_models()
    pipe.progress_bar = iter
    requests = [{**REQUESTS[model], "height": 64, "width": 64, **more} for more in ({}, {"seed": 7, "prompt": "a cat"})]
    with torch.no_grad():
        latents = pipe.denoise(*pipe.prepare(requests)).float()
    digest = hashlib.blake2b(latents.numpy().tobytes(), digest_size=8).hexdigest()
    return f"{digest} {latents.norm().item():.6g}"


def everything(folder: Path, names=None, say: Callable = print) -> dict:
    """All runs, in order, and all sampled latents."""
    write_data(folder / "data")
    found = {}
    for name in names or RUNS:
        found[name] = run(name, folder)
        say(name, json.dumps(found[name]))
    for model in REQUESTS if names is None else ():
        found[f"sampled_{model}"] = sampled(model)
        say(model, found[f"sampled_{model}"])
    return found


def differences(found: dict, recorded: dict) -> list[str]:
    """The differences between two records, by run and kind of result."""
    lines = []
    for name, now in found.items():
        before = recorded[name]
        for kind in now if isinstance(now, dict) else ():
            if now[kind] != before[kind]:
                lines.append(f"{name}: {kind}: {before[kind]} -> {now[kind]}")
        if not isinstance(now, dict) and now != before:
            lines.append(f"{name}: {before} -> {now}")
    return lines


def main(what: str, *names: str) -> None:
    import torch

    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        found = everything(Path(folder), names or None)
    if what == "record":
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        return
    lines = differences(found, json.loads(RECORD.read_text()))
    print("\n".join(lines) or f"{len(found)} runs as recorded")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
