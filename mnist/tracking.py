"""The command that earlier versions have printed: python -m mnist.tracking runs/NAME."""

from mnist.runs.tracking import main

if __name__ == "__main__":
    main()
