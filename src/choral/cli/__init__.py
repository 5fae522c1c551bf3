"""The command line: its arguments, and one file for each command."""

try:
    from choral.cli.command_line import main
except ModuleNotFoundError as error:
    if error.name != "tyro":
        raise
    raise SystemExit(
        'choral: the command line needs tyro, which is not installed\n  hint: pip install "choral[cli]"'
    ) from None

__all__ = ["main"]
