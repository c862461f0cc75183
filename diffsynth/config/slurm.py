"""Submits a sweep as Slurm jobs: `python train.py -m hydra/launcher=slurm lora.rank=8,16 hydra.launcher.nodes=4`."""

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ..core.files import write_text
from ..core.process.signals import REQUEUE_STATUS
from .nodes import ConfigError, check
from .run_folder import is_finished
from .sweep import record, sweep_folder

# Overrides of the sweep itself, which the command of a job does not repeat.
SWEEP_KEYS = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.mode")

SCRIPT = f"""\
#!/usr/bin/env bash
# {{about}}
{{options}}

cd {{folder}}
{{before}}
main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
main_port=$((20000 + SLURM_JOB_ID % 10000))

srun --wait=120 {{python}} -m diffsynth.config.launch_with_signals {{machines}} \\
  --main_process_ip "$main_address" --main_process_port "$main_port" \\
  {{command}}
status=$?

# This status means that a signal (preemption or the time limit) stopped the run, and that its state is saved.
if [ $status -eq {REQUEUE_STATUS} ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit $status
fi
{{python}} -m diffsynth.report.sweep {{sweep}}
exit $status
"""


@dataclass
class SlurmLauncher(Launcher):
    """Writes a readable batch script for each job of a sweep and submits it; a job is one launch over all its nodes.

    A job whose run is finished is not submitted. Two jobs of one run never run at the same time (`singleton`).

    Args:
        nodes: Number of nodes per job.
        gpus_per_node: Number of GPUs per node, with one process each; with 0 a node runs one process.
        cpus_per_node: Number of CPUs per node; None takes the partition's default.
        time: Time limit of a job as Slurm spells it, such as `24:00:00`; None takes the partition's.
        warning: Seconds before the time limit at which Slurm signals the run to save its state.
        accelerate_config: Launcher file, such as `conf/accelerate/fsdp2.yaml`; None trains with DDP.
        before: Shell lines that run before the launch, such as `module load cuda`.
        sbatch: Other options of `sbatch` by their long names; None leaves one out, True sets one that takes no value.
    """

    __module__ = "hydra_plugins.diffsynth"  # see `register`

    nodes: int = 1
    gpus_per_node: int = 1
    cpus_per_node: int | None = None
    time: str | None = None
    warning: int = 300
    accelerate_config: str | None = None
    before: Sequence[str] = ()
    sbatch: Mapping[str, str | int | bool | None] = field(default_factory=dict)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        check(config.hydra.launcher, SlurmLauncher)
        if self.accelerate_config is not None and not Path(self.accelerate_config).exists():
            raise ConfigError(
                f"hydra.launcher.accelerate_config: there is no file {self.accelerate_config} in {Path.cwd()}; "
                "expected one such as conf/accelerate/fsdp2.yaml."
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit all jobs without waiting for them; each returns its Slurm id, or None if its run is finished."""
        setup_globals()
        jobs = enumerate(job_overrides, initial_job_idx)
        scripts = [self._write(number, list(overrides)) for number, overrides in jobs]
        return [
            JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=_submit(script) if script else None)
            for overrides, script in scripts
        ]

    def _write(self, number: int, overrides: list[str]) -> tuple[list[str], Path | None]:
        """Write the script of one job into the folder of the sweep; return its overrides and path, None if finished."""
        job, folder = self.loader.load_sweep_config(self.config, overrides), sweep_folder(self.config)
        run_dir = Path(job.run_dir)
        record(folder, number, run_dir, overrides)
        if is_finished(job):
            return overrides, None
        run_dir.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of its log
        script = folder / f"{number}.sh"
        write_text(script, self._script(run_dir, folder, overrides), errors="surrogateescape")  # a shell reads bytes
        return overrides, script

    def _script(self, run_dir: Path, sweep: Path, overrides: list[str]) -> str:
        hydra, task = self.config.hydra.overrides.hydra, self.config.hydra.overrides.task
        hydra_overrides = [override for override in hydra if not override.startswith(SWEEP_KEYS)]
        flags = [word for word in sys.argv[1:] if word not in {*task, *hydra, "-m", "--multirun"}]  # as --config-name
        return SCRIPT.format(
            about=f"{' '.join(overrides)} → {run_dir}",
            options="\n".join(f"#SBATCH --{option}" for option in self._options(run_dir)),
            folder=shlex.quote(str(Path.cwd())),
            before="\n".join(self.before),
            python=shlex.quote(sys.executable),
            machines=shlex.join(self._machines()),
            command=shlex.join([sys.argv[0], *flags, *hydra_overrides, *overrides]),
            sweep=shlex.quote(str(sweep)),
        )

    def _options(self, run_dir: Path) -> list[str]:
        options = {
            "job-name": run_dir.name,
            "dependency": "singleton",
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_node,
            "time": self.time,
            "signal": f"USR1@{self.warning}",
            "requeue": True,
            "open-mode": "append",
            "output": run_dir / "slurm-%j.log",
            **self.sbatch,
        }
        given = {name: value for name, value in options.items() if value is not None}
        return [name if value is True else f"{name}={value}" for name, value in given.items()]

    def _machines(self) -> list[str]:
        """Return the options of accelerate's launcher about machines and processes."""
        processes = self.nodes * max(self.gpus_per_node, 1)
        file = ["--config_file", self.accelerate_config] if self.accelerate_config else []
        kind = ["--multi_gpu"] if processes > 1 and not file else []
        standard = ["--deepspeed_multinode_launcher", "standard"] if self.nodes > 1 else []  # Slurm starts every node
        return [*file, *kind, "--num_machines", str(self.nodes), "--num_processes", str(processes), *standard]


def register() -> None:
    """Register the launcher with Hydra, which accepts launchers only from the package `hydra_plugins`."""
    Plugins.instance().register(SlurmLauncher)  # first, because this call imports the package if it is installed
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    package.diffsynth = sys.modules[__name__]


def _submit(script: Path) -> str:
    """Submit a script and return the id of its Slurm job."""
    try:
        command = ["sbatch", "--parsable", script]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    except FileNotFoundError:
        raise ConfigError(f"sbatch was not found, so {script} is not submitted; run this on a Slurm machine.") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"sbatch refuses {script}: {error.stderr.strip()}") from error
    print(f"{script}: job {done.stdout.strip()}")
    return done.stdout.strip()
