"""``python -m mycel``."""

from mycel.cli import main

main()
