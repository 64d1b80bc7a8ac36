"""``python -m mingle``."""

from mingle.cli import run_and_exit

run_and_exit()
