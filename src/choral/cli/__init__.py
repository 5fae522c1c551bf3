"""The command line: its arguments, and one file for each command."""

from choral.cli.command_line import main

__all__ = ["main"]
