"""The old name of `launch_with_signals`."""

import sys

from .launch_with_signals import launch

if __name__ == "__main__":  # Slurm keeps the scripts of queued jobs, and those written until 2026-11-30 have this name
    sys.exit(launch(sys.argv[1:]))
