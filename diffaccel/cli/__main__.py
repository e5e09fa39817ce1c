"""``python -m diffaccel.cli``: the command line where a launcher wants a module."""

from diffaccel.cli import main

main()
