"""`python -m diffsynth.report outputs/<run>…` writes the page of each run."""

import sys

from . import write_report

for folder in sys.argv[1:] or sys.exit(__doc__):
    print(write_report(folder))
