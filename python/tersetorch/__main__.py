"""python -m tersetorch: the command, where its script is not on PATH; torchrun -m tersetorch: on several ranks."""

from tersetorch.cli import main

if __name__ == "__main__":
    main()
