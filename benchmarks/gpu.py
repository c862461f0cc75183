"""Measures training steps of released architectures on one GPU, without network and without weights.

    python benchmarks/gpu.py --minutes 9

Weights are random and inputs are made on the fly; see docs/performance.md. Each row runs in a process of its own, the
most valuable first; its result is appended to OUT/rows.jsonl, and OUT/table.md is written anew.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from on_gpu import table
from on_gpu.rows import BenchmarkRow, distinct, fitting, matching

from diffsynth.config.command_line import let_segments_grow
from diffsynth.core.process.console import keep_console
from diffsynth.core.process.signals import child_environment, end_with_parent

FEW_CORES = 4  # a guess: with fewer, a plan beside the measurement would slow it down
PATIENCE = 4  # a guess: a row may take so many times its expected seconds, and a minute
RESULT = "result: "  # begins the line of a child process that has its result
LINES = 20  # the last ones that a process that failed has printed are kept


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="measure the rows that fit into this time; default: all")
    parser.add_argument("--rows", default="*", metavar="GLOB", help="names of rows, such as 'qwen_image-1024-*'")
    parser.add_argument("--list", action="store_true", help="print the rows and their arguments of train.py, and end")
    parser.add_argument("--profile", metavar="GLOB", help="measure these rows only, and keep their traces in OUT")
    parser.add_argument("--resume", action="store_true", help="skip rows that OUT/rows.jsonl has measured already")
    parser.add_argument("--rehearse", action="store_true", help="run every kind of row on tiny models, in one process")
    parser.add_argument("--tiny", action="store_true", help="measure embedded models instead of the released ones")
    parser.add_argument("--device", default="cuda", help="cuda, cpu or mps")
    parser.add_argument("--steps", type=at_least_one, default=20, help="steps that are timed")
    parser.add_argument("--warm-up", type=at_least_one, default=3, help="steps before them")
    parser.add_argument("--out", type=Path, help="folder of the results; default: outputs/gpu, or outputs/gpu_tiny")
    parser.add_argument("--measure", metavar="ROW", help=argparse.SUPPRESS)
    parser.add_argument("--plan", metavar="ROW", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.out = given.out or Path("outputs/gpu_tiny" if given.tiny or given.rehearse else "outputs/gpu")
    return given


def at_least_one(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    if given.list:
        print(*(f"{row.name}: {row.described}" for row in matching(given.rows)), sep="\n")
    elif given.measure or given.plan:
        alone(given)
    elif given.rehearse:
        rehearse(given)
    else:
        try:
            measure_all(given)
        except KeyboardInterrupt:
            print("Stopped; the same command with --resume goes on.", file=sys.stderr)
        print(table.write(given.out))


def measure_all(given: argparse.Namespace) -> None:
    """Measure the rows that are asked for, each in a process of its own, as long as there is time."""
    check_place(given)
    done = table.read(given.out / "rows.jsonl") if given.resume else {}
    asked = matching(given.profile or given.rows)
    rows = [row for row in asked if not is_measured(done.get(row.name, {}), given)]
    if len(rows) < len(asked):
        print(f"{len(asked) - len(rows)} rows are measured already.")
    ends = time.monotonic() + 60 * (math.inf if given.minutes is None else given.minutes)
    rows = fitting(rows, ends - time.monotonic())
    minutes, names = sum(row.seconds for row in rows) / 60, [row.name for row in rows]
    print(f"{len(rows)} rows, {minutes:.0f} minutes expected:", *names, flush=True)
    for row in rows:
        if row.seconds > ends - time.monotonic():
            continue
        began = time.monotonic()
        result = {**about(row, given), **measured(row, given, ends - began)}
        result["took"] = round(time.monotonic() - began, 1)
        table.append(given.out / "rows.jsonl", result)
        table.write(given.out)
        found = result.get("error") or f"{result['seconds']:.4f} s/step"
        print(f"{row.name}: {found} (took {result['took']} s)", flush=True)
        if given.profile and "seconds" in result:
            print(f"Its trace is {given.out / row.name}.json; open it at https://ui.perfetto.dev.")


def check_place(given: argparse.Namespace) -> None:
    """Check that there is such a device, and a folder to write to.

    Raises:
        SystemExit: There is not.
    """
    from diffsynth.core.devices import choose_device

    try:
        choose_device(given.device)
        given.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{error} (the benchmark's options are --device and --out)") from error


def is_measured(result: Mapping[str, Any], given: argparse.Namespace) -> bool:
    """Whether a result is one of the same command."""
    return "seconds" in result and (result["on"], result["tiny"]) == (given.device, given.tiny)


def about(row: BenchmarkRow, given: argparse.Namespace) -> dict[str, Any]:
    """What was measured: the row, its arguments, where, and the code's commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    where = {"on": given.device, "tiny": given.tiny, "steps": given.steps, "profiled": given.profile is not None}
    return {"row": row.name, "arguments": row.described, **where, "commit": commit.stdout.strip() or None}


def measured(row: BenchmarkRow, given: argparse.Namespace, seconds_left: float) -> dict[str, Any]:
    """Measure a row and plan it, each in a process, at once if there are cores enough; errors become results."""
    limit = min(seconds_left, PATIENCE * row.seconds + 60)
    measurement = start(row, "measure", given)
    if (os.cpu_count() or 1) < FEW_CORES:
        found = result_of(measurement, limit)
        planned = result_of(start(row, "plan", given), limit)
    else:
        plan = start(row, "plan", given)
        found = result_of(measurement, limit)
        if "error" in found:
            plan.kill()
        planned = result_of(plan, limit)
    return found | ({"plan_error": planned["error"]} if "error" in planned else planned)


def start(row: BenchmarkRow, what: str, given: argparse.Namespace) -> subprocess.Popen:
    """Start this script to measure or to plan one row; it prints its result as the last line."""
    options = [f"--{what}={row.name}", f"--device={given.device}", f"--out={given.out}"]
    options += [f"--profile={row.name}"] if given.profile else []
    options += [f"--steps={given.steps}", f"--warm-up={given.warm_up}", *["--tiny"] * given.tiny]
    threads = {"OMP_NUM_THREADS": "1"} if what == "plan" else {}
    return piped([sys.executable, __file__, *options], os.environ | threads | child_environment())


def piped(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a process whose output is read, whatever bytes it prints."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, env=environment, **streams)


def result_of(process: subprocess.Popen, limit: float) -> dict[str, Any]:
    """Wait at most `limit` seconds for a process; a failure becomes `error`, beside the last lines that it printed."""
    try:
        output, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no result within {limit:.0f} s; leave out --minutes for more time"}
    results = [line for line in output.splitlines() if line.startswith(RESULT)]
    if process.returncode == 0 and results:
        return json.loads(results[-1].removeprefix(RESULT))
    lines = errors.strip().splitlines()
    if process.returncode > 0 and lines:
        return {"error": lines[-1], "printed": lines[-LINES:]}
    return {"error": f"ended with exit code {process.returncode} and no result", "printed": lines[-LINES:]}


def alone(given: argparse.Namespace) -> None:
    """Measure or plan one row in this process, and print the result as a JSON line."""
    end_with_parent()
    let_segments_grow()
    with TemporaryDirectory() as folder:
        measurement = measurement_of(matching(given.measure or given.plan)[0], given, Path(folder))
        if given.plan:
            if hasattr(os, "nice"):
                os.nice(19)
            print(RESULT + json.dumps(measurement.plan()))
        else:
            print(RESULT + json.dumps({**measurement.measure(), **machine(given.device)}))


def measurement_of(row: BenchmarkRow, given: argparse.Namespace, folder: Path) -> Any:
    from on_gpu.measure import Measurement, Setting  # here, because the parent process needs no torch

    profile = given.out if given.profile else None
    return Measurement(row, Setting(given.device, folder, profile, given.tiny, given.warm_up, given.steps))


def machine(device: str) -> dict[str, str]:
    """What the figures depend on, besides the code."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": name, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def rehearse(given: argparse.Namespace) -> None:
    """Measure each kind of row on a tiny model, and plan the first of each model; raises what goes wrong."""
    from diffsynth.core.memory import compile as compilation

    compilation.BACKEND = "eager"  # inductor's C++ takes minutes
    given.tiny, given.device, given.steps, given.warm_up = True, "cpu", 1, 1
    given.out.mkdir(parents=True, exist_ok=True)
    kinds: dict[tuple, Any] = {}
    planned: set[str] = set()
    for row in distinct(matching(given.rows)):
        with TemporaryDirectory() as folder:
            measurement = measurement_of(row, given, Path(folder))
            measurement.meta_modules = kinds.setdefault(measurement.kind, measurement).meta_modules
            plan = {} if row.model in planned else measurement.plan()
            planned.add(row.model)
            result = {**about(row, given), **plan, **measurement.measure(), **machine(given.device)}
            print(f"{row.name}: {result['seconds']:.4f} s/step", flush=True)
        table.append(given.out / "rows.jsonl", result)
    print(table.write(given.out))


if __name__ == "__main__":
    keep_console()
    main()
