"""Write the report of each run: `python -m diffsynth.report outputs/<run>…`."""

import sys

from . import explained, write_report

with explained():
    for folder in sys.argv[1:] or sys.exit(__doc__):
        print(write_report(folder))
