"""A sweep as Slurm jobs: `python train.py -m hydra/launcher=slurm lora.rank=8,16 hydra.launcher.nodes=4`."""

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
from ..core.signals import REQUEUE_STATUS
from .nodes import ConfigError, check
from .run_folder import is_finished
from .sweep import record, sweep_folder

OWN = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweep", "hydra.mode")  # overrides that are not a job's

SCRIPT = f"""\
#!/usr/bin/env bash
# {{about}}
{{options}}

cd {{folder}}
{{before}}
main_address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
main_port=$((20000 + SLURM_JOB_ID % 10000))

srun --wait=120 {{python}} -m diffsynth.config.launch {{machines}} \\
  --main_process_ip "$main_address" --main_process_port "$main_port" \\
  {{command}}
status=$?

# Asked to stop by a preemption or the end of its time, the run has saved: the same job goes on from there.
if [ $status -eq {REQUEUE_STATUS} ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit $status
fi
{{python}} -m diffsynth.report.sweep {{sweep}}
exit $status
"""


@dataclass
class SlurmLauncher(Launcher):
    """Writes a readable batch script for every job of a sweep and submits it; each is one launch over all its nodes.

    A job whose run is finished is not submitted. Two jobs of one run wait for each other (`singleton`).

    Args:
        nodes, gpus_per_node, cpus_per_node: Of each job; without GPUs a node runs one process.
        time: Longest time of a job in Slurm's spelling, such as `24:00:00`; None is the partition's.
        warning: Seconds before its end in which a run that is out of time can save.
        accelerate_config: Launcher file, such as `conf/accelerate/fsdp2.yaml`; None is DDP.
        before: Lines of shell before the launch, such as `module load cuda`.
        sbatch: Further options of `sbatch` by their long names; None leaves one out, True is for those without value.
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
            raise ConfigError(f"hydra.launcher.accelerate_config: there is no file {self.accelerate_config}.")

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Submit all jobs and return at once; what they return is what Slurm calls them, None if already finished."""
        setup_globals()
        jobs = enumerate(job_overrides, initial_job_idx)
        scripts = [self._write(number, list(overrides)) for number, overrides in jobs]
        return [JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=_submit(s)) for overrides, s in scripts]

    def _write(self, number: int, overrides: list[str]) -> tuple[list[str], Path | None]:
        """The script of one job, in the folder of the sweep; None where its run is finished."""
        job, folder = self.loader.load_sweep_config(self.config, overrides), sweep_folder(self.config)
        run_dir = Path(job.run_dir)
        record(folder, number, run_dir, overrides)
        if is_finished(job):
            return overrides, None
        run_dir.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its log
        script = folder / f"{number}.sh"
        write_text(script, self._script(run_dir, folder, overrides))
        return overrides, script

    def _script(self, run_dir: Path, sweep: Path, overrides: list[str]) -> str:
        own = [word for word in self.config.hydra.overrides.hydra if not word.startswith(OWN)]
        given = {*self.config.hydra.overrides.task, *self.config.hydra.overrides.hydra, "-m", "--multirun"}
        flags = [word for word in sys.argv[1:] if word not in given]  # such as --config-name
        return SCRIPT.format(
            about=f"{' '.join(overrides)} → {run_dir}",
            options="\n".join(f"#SBATCH --{option}" for option in self._options(run_dir)),
            folder=shlex.quote(str(Path.cwd())),
            before="\n".join(self.before),
            python=shlex.quote(sys.executable),
            machines=shlex.join(self._machines()),
            command=shlex.join([sys.argv[0], *flags, *own, *overrides]),
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
        """What accelerate's launcher is told of the machines."""
        processes = self.nodes * max(self.gpus_per_node, 1)
        file = ["--config_file", self.accelerate_config] if self.accelerate_config else []
        kind = ["--multi_gpu"] if processes > 1 and not file else []
        standard = ["--deepspeed_multinode_launcher", "standard"] if self.nodes > 1 else []  # Slurm starts every node
        return [*file, *kind, "--num_machines", str(self.nodes), "--num_processes", str(processes), *standard]


def register() -> None:
    """Make the launcher known to Hydra, which takes launchers from below `hydra_plugins` only."""
    Plugins.instance().register(SlurmLauncher)  # first, as it looks for that package itself
    home = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))  # absent where no plugin is installed
    home.diffsynth = sys.modules[__name__]


def _submit(script: Path | None) -> str | None:
    """What Slurm calls the job of this script."""
    if script is None:
        return None
    try:
        done = subprocess.run(["sbatch", "--parsable", script], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise ConfigError(f"There is no sbatch here to submit {script} by; run this where Slurm is.") from None
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"sbatch refuses {script}: {error.stderr.strip()}") from error
    print(f"{script}: job {done.stdout.strip()}")
    return done.stdout.strip()
