"""The command line: ``choral init | compare | train | audit | verify | ledger | serve | join | poc | ...``.

Exit codes: 0 done (for `audit` and `compare`: no violation found), 1 a claim was found violated or not verifiable,
2 wrong usage, bad input, an error in the user's own code, or a run that had to stop. Ctrl-C ends with 130 and keeps
every completed round.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence

from choral.cli.arguments import ArgumentsError, debug, want_tracebacks
from choral.cli.short_help import SHORT
from choral.doors import command_line
from choral.errors import ConfigError
from choral.failures import failure_of, place_of

Command = Callable[[list[str]], int]

_TRAIN = ("compare", "train", "serve", "poc")

_HELP = """\
usage: choral COMMAND [options]

Train PyTorch models on data that may not be seen, and say what that costs.

commands:
  init --data FILE           write settings for a table of your own: CSV or Parquet, by flags or by questions
  compare CONFIG --out DIR   train every configuration of a TOML file; accuracy, epsilon, bytes and time side by side
  train CONFIG --out DIR     train one configuration: federated (default), or --centralized on pooled data
  stats CONFIG               statistics of the parties' records in one secure sum, exact or with noise
  audit DIR                  hold what a finished run claims against its ledgers and what the server saw;
                             or a model of your own: --scores FILE, --model FILE.py, --probe
  report DIR                 draw the report of a folder again, from its report.json
  serve CONFIG --directory FILE --out DIR
                             train with sites at their own machines: be their coordinator
  join SITE                  be a site: connect to a coordinator, and train what was approved here
  verify FILE...             hold receipts, manifests, reports and run folders against what was signed of them
  poc CONFIG --out DIR       rehearse that: keys, site folders and all processes on this machine, to the report
  ledger show|sum|head FILE...
                             what was spent, what it comes to together, whether a ledger was put back
  export DIR --out FILE      write a run's model as .onnx or .pt2 for inference, checked for equal outputs
  budget                     how much noise a promise needs, or what a noise is worth
  sums --parties N           which secure sum when: trips, bytes, whom it withstands
  site COMMAND               a party on its own machine: keys, settings, pinned certificates, approvals, log

Start here:  choral compare examples/digits.toml --out runs/digits
Your data:   choral init --data visits.csv --key hospital --label died
Details:     choral COMMAND --help, and --help-all for every flag
Tracebacks:  choral COMMAND ... --debug

exit codes: 0 done / no violation found, 1 claim violated or not verifiable (audit, compare), 2 bad input, an error in
            your own code, or a run that had to stop, 130 Ctrl-C
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        from choral import __version__

        print(f"choral {__version__}")
        return 0
    with command_line():
        return _run(words)


def _run(words: list[str]) -> int:
    want_tracebacks("--debug" in words)
    words = [word for word in words if word != "--debug"]
    try:
        if not words or words[0] not in _COMMANDS:
            near = difflib.get_close_matches("".join(words[:1]), _COMMANDS, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"unknown command {''.join(words[:1])!r}",
                hint=f"{meant}one of: {', '.join(_COMMANDS)}; see choral --help",
            )
        if words[0] in SHORT and {"-h", "--help"} & {*words}:
            print(SHORT[words[0]], end="")
            return 0
        return _COMMANDS[words[0]](words[1:])
    except ArgumentsError as stop:  # already printed
        return stop.code
    except KeyboardInterrupt:
        kept = "; completed rounds are kept, --resume goes on from them" if words[0] in _TRAIN else ""
        print(f"choral: stopped{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except SystemExit as error:
        if place_of(error) is not None:
            print(failure_of(error).lines(debug=debug()), end="", file=sys.stderr)
        return 2  # else it is rich's, which ends the process when the reader of a pipe has left
    except Exception as error:
        # Python's own exit code, 1, would say that a claim is violated.
        print(failure_of(error).lines(debug=debug()), end="", file=sys.stderr)
        return 2


# Torch takes seconds to import, so only the commands that train import it.
def _compare(words: list[str]) -> int:
    from choral.cli.train import compare

    return compare(words)


def _init(words: list[str]) -> int:
    from choral.cli.init import init

    return init(words)


def _train(words: list[str]) -> int:
    from choral.cli.train import train

    return train(words)


def _stats(words: list[str]) -> int:
    from choral.cli.stats import stats

    return stats(words)


def _audit(words: list[str]) -> int:
    from choral.cli.audit import audit

    return audit(words)


def _export(words: list[str]) -> int:
    from choral.cli.export import export

    return export(words)


def _serve(words: list[str]) -> int:
    from choral.cli.sites.serve import serve

    return serve(words)


def _join(words: list[str]) -> int:
    from choral.cli.sites.serve import join

    return join(words)


def _poc(words: list[str]) -> int:
    from choral.cli.sites.poc import poc

    return poc(words)


def _budget(words: list[str]) -> int:
    from choral.cli.budget import budget

    return budget(words)


def _sums(words: list[str]) -> int:
    from choral.cli.sums import sums

    return sums(words)


def _report(words: list[str]) -> int:
    from choral.cli.report import report

    return report(words)


def _site(words: list[str]) -> int:
    from choral.cli.sites.site import site

    return site(words)


def _ledger(words: list[str]) -> int:
    from choral.cli.ledger import ledger

    return ledger(words)


def _verify(words: list[str]) -> int:
    from choral.verify import main as verify  # which needs nothing else of Choral

    if not words:
        raise ConfigError("FILE is not given", hint="receipts, manifests, reports or run folders; choral verify --help")
    try:
        return verify(words)
    except SystemExit as stop:  # of its own parser, which has said everything
        return int(stop.code or 0)


_COMMANDS: dict[str, Command] = {
    "init": _init,
    "compare": _compare,
    "train": _train,
    "stats": _stats,
    "audit": _audit,
    "verify": _verify,
    "ledger": _ledger,
    "export": _export,
    "serve": _serve,
    "join": _join,
    "poc": _poc,
    "budget": _budget,
    "sums": _sums,
    "report": _report,
    "site": _site,
}
