"""`python -m vestige.cli`, for a virtual environment that is not activated."""

from vestige.cli import main

main()
