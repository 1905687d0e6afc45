"""``python -m kernelgraft``: the command line, for launchers such as ``torchrun -m``."""

from kernelgraft.cli import main

if __name__ == "__main__":
    main()
