"""Measures the peak memory of loading a checkpoint, against a bound: its size, its largest tensor and 300 MB.

    python benchmarks/load_memory.py [--layers 3]

A Qwen-Image transformer of real width and few layers is written in shards, then loaded in a new process. The bound is
for anonymous memory. When tensors are cast, RSS also has the mapped pages of one shard, which the kernel may drop.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from diffsynth.core.process.console import keep_console

MB = 1e6
ALLOWANCE = 300 * MB
DTYPES = {"as stored (bf16)": "bfloat16", "cast to fp32": "float32", "cast to fp16": "float16"}


def memory() -> dict[str, float]:
    """Return the resident bytes of this process, with and without the pages of mapped files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")}


def peak_of(work) -> dict[str, float]:
    """Return the peak of `memory` while `work` runs, above its value before, sampled every 2 ms."""
    start, peak, done = memory(), memory(), threading.Event()

    def watch():
        while not done.wait(0.002):
            for name, size in memory().items():
                peak[name] = max(peak[name], size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return {name: peak[name] - start[name] for name in peak}


def write_checkpoint(folder: Path, layers: int):
    from diffusers import QwenImageTransformer2DModel

    torch.set_default_dtype(torch.bfloat16)
    QwenImageTransformer2DModel(num_layers=layers).save_pretrained(folder, max_shard_size="500MB")


def load(folder: Path, dtype: str):
    """Load the checkpoint, read every weight once as a forward pass would, and print the figures as JSON."""
    import accelerate  # noqa: F401 - imports are not what is measured
    import diffusers
    import transformers  # noqa: F401

    from diffsynth.core.loader import ModelConfig, load_model

    diffusers.QwenImageTransformer2DModel  # noqa: B018 - imported lazily
    loaded = {}

    def work():
        start = time.perf_counter()
        loaded["model"] = load_model(ModelConfig(str(folder)), getattr(torch, dtype))
        loaded["seconds"] = time.perf_counter() - start
        for parameter in loaded["model"].parameters():
            parameter.view(torch.int16).max()

    peak = peak_of(work)
    sizes = [parameter.nbytes for parameter in loaded["model"].parameters()]
    print(json.dumps(peak | {"size": sum(sizes), "largest": max(sizes), "seconds": loaded["seconds"]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return load(Path(arguments.load[0]), arguments.load[1])

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), arguments.layers)
        for title, dtype in DTYPES.items():
            command = [sys.executable, __file__, "--load", folder, dtype]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            bound = figures["size"] + figures["largest"] + ALLOWANCE
            print(
                f"{title:17} model {figures['size'] / MB:6.0f} MB, largest tensor {figures['largest'] / MB:4.0f} MB, "
                f"load {figures['seconds']:5.2f} s | peak RSS {figures['VmRSS'] / MB:6.0f} MB "
                f"({figures['VmRSS'] / bound:.2f} of the bound), anonymous {figures['RssAnon'] / MB:6.0f} MB "
                f"({figures['RssAnon'] / bound:.2f})"
            )


if __name__ == "__main__":
    keep_console()
    main()
