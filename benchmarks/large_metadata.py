"""Measures metadata of ten million rows: opening it, the first time and later, and reading samples anywhere in it.

    python benchmarks/large_metadata.py [--rows 10000000]

Each opening is measured in a process of its own. The rows name 16 small images, so that reading files costs the same
everywhere. RSS is the peak above what the imports take; it counts the pages of the mapped table that are touched.
"""

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from diffsynth.core.process.console import keep_console

REPEAT, BATCH = 100, 16
ROWS = {
    "metadata.csv": (
        "image,prompt\n",
        "{image}.png,a synthetic prompt that is about as long as others: number {number}\n",
    ),
    "metadata.jsonl": (
        "",
        '{{"image": "{image}.png", "prompt": "a synthetic prompt that is about as long as others: number {number}"}}\n',
    ),
}


def write(folder: Path, count: int) -> None:
    from PIL import Image

    for number in range(16):
        Image.new("RGB", (64, 64), (16 * number, 0, 0)).save(folder / f"{number}.png")
    for name, (header, row) in ROWS.items():
        with (folder / name).open("w") as file:
            file.write(header)
            file.writelines(row.format(image=number % 16, number=number) for number in range(count))


def measure(folder: str, name: str) -> dict[str, float]:
    """Return the seconds and the megabytes of each step, in this process."""
    from diffsynth.core.data import SampleOrder, UnifiedDataset

    figures, before = {}, peak()

    def timed(step: str, work: Callable):
        start = time.perf_counter()
        result = work()
        figures[step] = time.perf_counter() - start
        return result

    dataset = timed("open", lambda: UnifiedDataset.from_folder(folder, name, height=64, width=64, repeat=REPEAT))
    figures["RSS after opening (MB)"] = peak() - before
    order = SampleOrder(len(dataset), seed=0)

    def batch(position: int) -> list[dict]:
        return [dataset[order.sample(position + slot).index] for slot in range(BATCH)]

    last = (len(dataset.rows) - 1) * REPEAT
    timed("first batch", lambda: batch(0))
    timed(f"batch at {last:,}", lambda: batch(last))
    figures["RSS after batches (MB)"] = peak() - before
    pickled = timed("pickle for a worker", lambda: pickle.dumps(dataset.rows))
    figures["pickled (bytes)"] = len(pickled)
    timed(f"scan of {len(dataset.scanned):,} rows", dataset.scan)
    timed("fingerprint", dataset.fingerprint)
    return figures | {"peak RSS (MB)": peak() - before}


def peak() -> float:
    """Return the peak resident megabytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(folder: str, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", folder, name]
    environment = os.environ | {"DIFFSYNTH_CACHE": f"{folder}/cache"}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "NAME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return print(json.dumps(measure(*arguments.measure)))

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), arguments.rows)
        for name in ROWS:
            print(f"{name}: {arguments.rows:,} rows, {(Path(folder) / name).stat().st_size / 1e6:,.0f} MB")
            first, second = in_a_process(folder, name), in_a_process(folder, name)
            for step in first:
                print(f"  {step:32} first {first[step]:12,.3f}   second {second[step]:12,.3f}", flush=True)


if __name__ == "__main__":
    keep_console()
    main()
