"""The command line `evodiff-jax`, a command a module.

Exit codes: 0 done, 2 a bad argument, a bad file or a missing package, 130 interrupted, 141 nobody reads the output,
143 `generate` ended by SIGTERM. What went wrong is one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from evodiff_jax import __version__, interrupts
from evodiff_jax.cli.checkpoints import add_convert_arguments, add_info_arguments, run_convert, run_info
from evodiff_jax.cli.compare import add_compare_arguments, run_compare
from evodiff_jax.cli.diagnose import add_diagnose_arguments, run_diagnose
from evodiff_jax.cli.evaluate import add_evaluate_arguments, run_evaluate
from evodiff_jax.cli.fit import add_fit_arguments, run_fit
from evodiff_jax.cli.generate import add_generate_arguments, run_generate
from evodiff_jax.cli.images import (
    add_export_arguments,
    add_grid_arguments,
    add_verify_arguments,
    run_export,
    run_grid,
    run_verify,
)
from evodiff_jax.cli.sample import add_sample_arguments, run_sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments after the program's name, by default those of the process.

    Returns:
      The exit code.
    """
    try:
        # --help and --version leave the parser with SystemExit when they have printed.
        with interrupts.watched(), contextlib.suppress(SystemExit):
            args = _parser().parse_args(argv)
            args.run(args)
        _flush_stdout()
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except (ValueError, OSError, ModuleNotFoundError, jax.errors.JaxRuntimeError) as error:
        return _fail(error)
    except KeyboardInterrupt as error:
        code, message = interrupts.ending(error)
        sys.stderr.write(message)
        return code
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse with its complaints as exceptions: `main` prints them in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        interrupts.COMMAND, description="Few-step sampling of diffusion models in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"{interrupts.COMMAND} {__version__}")
    known = (
        ("sample", add_sample_arguments, run_sample, "sample images from a model, the packaged one by default"),
        (
            "generate",
            add_generate_arguments,
            run_generate,
            "make many images on many devices or hosts, and go on where a run was stopped",
        ),
        ("verify", add_verify_arguments, run_verify, "compare the images of generate with their checksums"),
        ("grid", add_grid_arguments, run_grid, "draw images of generate as one picture"),
        ("export", add_export_arguments, run_export, "write images of generate as PNG files, npz or an array"),
        ("compare", add_compare_arguments, run_compare, "compare solvers on a model"),
        ("diagnose", add_diagnose_arguments, run_diagnose, "entropy, variance and errors of solvers, step by step"),
        ("fit", add_fit_arguments, run_fit, "fit plans of few model calls to a model"),
        (
            "evaluate",
            add_evaluate_arguments,
            run_evaluate,
            "FID of solvers on a model, from statistics of data and the Inception network",
        ),
        (
            "info",
            add_info_arguments,
            run_info,
            "show what a file of weights or a plan holds, or versions and packaged models",
        ),
        ("convert", add_convert_arguments, run_convert, "write a public checkpoint as a safetensors file"),
    )
    commands = parser.add_subparsers(required=True, metavar=f"{{{','.join(name for name, *_ in known)}}}")
    for name, add_arguments, run, summary in known:
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _fail(error: Exception) -> int:
    """Prints one line, whatever the message holds, and returns the exit code."""
    print(f"{interrupts.COMMAND}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _flush_stdout() -> None:
    """Flushes here, where a failure is still reported: at exit Python prints a traceback for it."""
    if sys.stdout is None:  # closed by whoever started the process
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_stdout()
        raise OSError(f"cannot write to standard output: {error.strerror}") from error


def _drop_stdout() -> None:
    """Sends what is still in the buffer nowhere, so that the flush at exit is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
