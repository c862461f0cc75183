"""Write the report of each run: `python -m diffsynth.report outputs/<run>…`."""

import sys

from ..core.console import keep_console
from . import write_report

keep_console()
for folder in sys.argv[1:] or sys.exit(__doc__):
    print(write_report(folder))
