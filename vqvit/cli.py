"""The command line: `vqvit quantize | sensitivity | plan | eval | export | bench | tune | inspect | env | doctor |
demo`.

Results go to stdout, as text or (`--json`) as one JSON object; progress and errors go to stderr. Exit status: 0; 1 if
what a command checks is wrong; 2 after an error; 130 after Ctrl-C; 141 where whoever reads the output has gone
(`| head`).
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import vqvit
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

ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)
"""What the package raises, with a message for people, when input or machine are not as expected."""

FAILED, INTERRUPTED, NOT_READ = 2, 128 + signal.SIGINT, 128 + 13  # 13: SIGPIPE, which ends other programs there


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        return NOT_READ
    except OSError as error:  # of stdout: its disk is full
        _silence()
        return _failed(f"cannot write the result: {os.strerror(error.errno) if error.errno else error}")
    except KeyboardInterrupt:
        _say("vqvit: interrupted")
        return INTERRUPTED
    except SystemExit:  # of --help and of usage errors
        try:
            sys.stdout.flush()
        except OSError:
            _silence()
        raise
    return status


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' own, for each file it reads
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR, format="%(name)s: %(message)s")
    command = COMMANDS[arguments.command]
    try:
        vqvit._heed_interrupts()
        result = command.run(arguments)
    except BrokenPipeError:
        raise
    except ERRORS as error:
        if arguments.traceback:
            traceback.print_exc()
        return _failed(str(error) or f"not enough memory ({type(error).__name__})")
    text = json.dumps(_plain(result), indent=1, allow_nan=False) if arguments.json else command.to_text(result)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
    return getattr(command, "exit_status", lambda _: 0)(result)


def _failed(message: str) -> int:
    _say(f"vqvit: error: {message}")
    return FAILED


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be gone too
        print(line, file=sys.stderr, flush=True)


def _silence() -> None:
    """Let the interpreter's own flush at the end succeed."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vqvit", description="Integer inference for Vision Transformers.")
    parser.add_argument("--version", action="version", version=f"vqvit {vqvit.__version__}")
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
