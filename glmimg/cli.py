"""The glmimg command: finds the command in a table, parses its flags, runs it, and turns errors into one clear line.

A row of COMMANDS names a function `command(parser) -> run`: it adds its flags to the parser and returns what is called
with the parsed arguments and gives the exit status. Modules are imported when their command is asked for, so that
`--help` needs no torch.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted,
143 terminated (fine-tuning, which saves first: 130).
"""

from __future__ import annotations

import argparse
import gc
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from glmimg import __version__
from glmimg.cli_progress import LoadBar
from glmimg.errors import BadInput, Cancelled, GlmimgError, UnknownName, out_of_memory
from glmimg.progress import watching

__all__ = ["COMMANDS", "main"]

Run = Callable[[argparse.Namespace], int]

# name -> (what it does, "module:function"); two words make a group.
COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("make pictures from prompts", "glmimg.cli_generate:generate"),
    "edit": ("change pictures as a prompt says", "glmimg.cli_generate:edit"),
    "tokens show": ("draw a token grid as a picture of colours", "glmimg.cli_tokens:show"),
    "tokens diff": ("compare two token grids", "glmimg.cli_tokens:diff"),
    "tokens extract": ("write the token grid of any picture", "glmimg.cli_tokens:extract"),
    "weights init": ("write a checkpoint with random weights", "glmimg.cli_weights:init"),
    "weights inspect": ("tell what a checkpoint is made of", "glmimg.cli_weights:inspect"),
    "weights verify": ("find everything that is wrong with a checkpoint", "glmimg.cli_weights:verify"),
    "weights convert": (
        "rewrite a checkpoint in another layout, dtype or size of shards",
        "glmimg.cli_weights:convert",
    ),
    "serve": ("answer requests for pictures: an OpenAI-compatible server and a page", "glmimg.cli_serve:serve"),
    "serve key": ("make an API key for the server", "glmimg.cli_serve:key"),
    "weights quantize": ("pack a checkpoint's weights in 8 or 4 bits", "glmimg.cli_weights_change:quantize"),
    "weights merge": ("add adapters to a checkpoint, or mix checkpoints", "glmimg.cli_weights_change:merge"),
    "weights diff": ("tell what two checkpoints differ in", "glmimg.cli_weights_change:diff"),
    "weights plan": ("tell how a checkpoint fits on a machine, and what it costs", "glmimg.cli_weights_plan:plan"),
    "weights card": ("write a checkpoint's model card", "glmimg.cli_weights_change:card"),
    "finetune": ("teach a checkpoint new pictures: to an adapter", "glmimg.cli_finetune:finetune"),
    "dataset check": ("look a folder of pictures over before training", "glmimg.cli_dataset:check"),
    "evaluate": ("judge a checkpoint and write its report card", "glmimg.cli_evaluate:evaluate"),
    "doctor": ("tell which devices work here, and why others do not", "glmimg.cli_doctor:doctor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        gc.set_threshold(100_000, 50, 50)  # a process of our own: collecting while modules load costs a second
        ends = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows knows no terminals that close
        for end in ends:  # what is half-written is cleaned up then as well
            if signal.getsignal(end) is signal.SIG_DFL:
                signal.signal(end, _terminated)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupted)
        if isinstance(sys.stdout, io.TextIOWrapper):  # letters that it has not are told by number: the work is done
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _dispatch(arguments)
        finally:  # here, where an error can be told: at the end of the process it is told as ignored
            if sys.stdout is not None:
                sys.stdout.flush()
    except (KeyboardInterrupt, Cancelled) as error:
        print(f"\nglmimg: {error if isinstance(error, Cancelled) else 'stopped'}", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    except GlmimgError as error:
        print(f"glmimg: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 1
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader of stdout or stderr went away
            print(f"glmimg: {error}", file=sys.stderr)
        _let_go()
        return 1
    except Exception as error:
        if _interruptions:
            print("\nglmimg: stopped", file=sys.stderr)
            return 130
        if out_of_memory(error):
            print(
                f"glmimg: out of memory: try --offload stage, --offload block, or a smaller --size ({error})",
                file=sys.stderr,
            )
            return 1
        raise


def _let_go() -> None:
    """Of what can no longer be written, so that it is not tried again at the end of the process."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_interruptions: list[int] = []


def _interrupted(number: int, frame: object) -> None:
    """Ctrl-C, remembered: libraries that are being loaded make other errors of it."""
    _interruptions.append(number)
    raise KeyboardInterrupt


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what batch systems, service managers and `docker stop` send; or SIGHUP, of a terminal that closes."""


def _terminated(number: int, frame: object) -> None:
    raise _Terminated


def _dispatch(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="glmimg: %(message)s", stream=sys.stderr)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"glmimg {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return _run(name, arguments[words:])
    group = {name: row for name, row in COMMANDS.items() if name.startswith(f"{arguments[0]} ")}
    if not group:
        raise UnknownName.of("command", arguments[0], {name.split()[0] for name in COMMANDS})
    if len(arguments) > 1 and arguments[1] not in ("-h", "--help"):
        raise UnknownName.of(f"{arguments[0]} command", arguments[1], [name.split()[1] for name in group])
    print(_overview(group))
    return 0 if len(arguments) > 1 else 2


def _run(name: str, arguments: list[str]) -> int:
    description, target = COMMANDS[name]
    module, function = target.split(":")
    parser = _Parser(f"glmimg {name}", description=description[0].upper() + description[1:] + ".", allow_abbrev=False)
    run: Run = getattr(import_module(module), function)(parser)
    parsed, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        raise UnknownName.of("option", unknown[0].split("=")[0], options)
    watched = watching.set(None if getattr(parsed, "quiet", False) else LoadBar())
    try:
        return run(parsed)
    finally:
        watching.reset(watched)


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, without all flags before it."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; {self.prog} --help tells the flags")


def _overview(commands: dict[str, tuple[str, str]] = COMMANDS) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {description}" for name, (description, _) in commands.items()]
    return "\n".join(
        [
            "usage: glmimg COMMAND ...",
            "",
            *lines,
            "",
            "glmimg COMMAND --help tells the flags; glmimg --version the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
