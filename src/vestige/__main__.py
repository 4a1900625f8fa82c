"""`python -m vestige`, for a virtual environment that is not activated, and `torchrun -m vestige`."""

from vestige.cli import main

if __name__ == "__main__":
    main()
