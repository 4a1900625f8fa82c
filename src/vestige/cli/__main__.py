"""`python -m vestige.cli`: the command that workers run. People type `vestige` or `python -m vestige`."""

from vestige.cli import main

main()
