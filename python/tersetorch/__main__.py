"""python -m tersetorch: the command, where its script is not on PATH."""

from tersetorch.cli import main

main()
