"""The ``chanzoo`` command line: parses, dispatches, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import ChanzooError, UsageError
from . import (
    autoload,
    classify,
    condense,
    doctor,
    eval,
    export,
    info,
    inspect,
    ls,
    prune,
    publish,
    pull,
    recipe,
    run,
    verify,
)

__all__ = ["build_parser", "main"]

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        ls, info, classify, eval, inspect, prune, condense, export, pull, verify, publish, recipe, doctor,
        run, autoload,
    )
}  # fmt: skip

EPILOG = """\
exit codes:
  0    done
  1    failed
  2    wrong usage: an argument, a file or a folder is not what was asked for
  3    verification failed: a weight file is not the published one
  4    the Hugging Face Hub cannot be reached
  130  interrupted

Data goes to standard output, words and progress bars to standard error.
Examples of a command: chanzoo COMMAND --help
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line, no usage block, and where to read more."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n  See: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="chanzoo",
        description="Channel methods for timm: list, use, measure and train the networks of chanzoo.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"chanzoo {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, module in COMMANDS.items():
        child = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        child.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.add_arguments(child)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; ``sys.argv`` by default.

    Returns:
        The exit code, see ``chanzoo --help``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug, command = "--debug" in argv, ""
    try:
        _check_command(argv)
        args = build_parser().parse_args(argv)
        debug, command = args.debug, args.command
        code = COMMANDS[command].run(args)
        sys.stdout.flush()
        return code
    except ChanzooError as error:
        if debug:
            raise
        return _report(error, error.exit_code)
    except KeyboardInterrupt:
        if debug:
            raise
        return _report("interrupted; nothing was left half written.", 130)
    except BrokenPipeError:  # the reader of a pipe has gone; Python must not trip over it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if debug or command == "run":  # a script's own errors are shown as Python shows them
            raise
        return _report(error, 1)


def _check_command(argv: list[str]) -> None:
    """Name the nearest command for an unknown one."""
    name = next((arg for arg in argv if arg != "--debug"), "")
    if name and not name.startswith("-") and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f'no command "{name}".{hint}   See all: chanzoo --help')


def _report(error: object, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"chanzoo: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
