"""The command line: `vqvit quantize | sensitivity | plan | eval | export | bench | tune | inspect | env | doctor |
demo`.

Results go to stdout, as text or (`--json`) as one JSON object; progress and errors go to stderr. Exit status: 0, 1 if
what a command checks is wrong, or 2 after an error.
"""

import argparse
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Sequence

from vqvit.commands import bench, demo, doctor, env, evaluate, export, inspect, plan, quantize, sensitivity, tune

COMMANDS = {
    "quantize": quantize,
    "sensitivity": sensitivity,
    "plan": plan,
    "eval": evaluate,
    "export": export,
    "bench": bench,
    "tune": tune,
    "inspect": inspect,
    "env": env,
    "doctor": doctor,
    "demo": demo,
}
"""Name to module: its docstring is the help, `add_arguments`, `run` to a JSON-ready dict, `to_text` of that dict, and
`exit_status` of it where that may be 1."""

ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError)
"""What the package raises, with a message for people, when input or machine are not as expected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, for each file it reads
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR, format="%(name)s: %(message)s")
    command = COMMANDS[arguments.command]
    try:
        result = command.run(arguments)
    except ERRORS as error:
        if arguments.traceback:
            traceback.print_exc()
        print(f"vqvit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vqvit: interrupted", file=sys.stderr)
        return 130
    text = json.dumps(_plain(result), indent=1, allow_nan=False) if arguments.json else command.to_text(result)
    print(text)
    return getattr(command, "exit_status", lambda _: 0)(result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vqvit", description="Integer inference for Vision Transformers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    shared.add_argument("--verbose", action="store_true", help="log decisions, such as the backend, to stderr")
    shared.add_argument("--traceback", action="store_true", help="show where an error came from")
    for name, module in COMMANDS.items():
        summary, _, details = module.__doc__.partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}",
            parents=[shared],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def _plain(value: object) -> object:
    """JSON has no infinity: such figures become the strings "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
