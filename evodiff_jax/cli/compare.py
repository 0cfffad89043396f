"""`evodiff-jax compare`: solvers on the packaged model, one of your own, or an exact one."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from evodiff_jax import __version__
from evodiff_jax.cli.arguments import add_checkpoint_arguments, guidance, integer
from evodiff_jax.cli.models import load_model
from evodiff_jax.cli.output import check_folder
from evodiff_jax.cli.plans import check_plans, facts_of, read_plans
from evodiff_jax.cli.prompts import read_prompts
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.schedules import edm

if TYPE_CHECKING:
    from evodiff_jax.evaluation import Problem
    from evodiff_jax.fitting import Fitted

_PACKAGED = "fashion_mnist"
_CALLS = (5, 6, 8, 10, 12, 15, 20)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax compare`."""
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="PATH",
        help="model file: a public checkpoint, or what training wrote (default: the packaged model)",
    )
    add_checkpoint_arguments(parser)
    add("--autoencoder", metavar="PATH", help="folder of the autoencoder, for a file of a model of latents such as DiT")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="for a folder of a model of texts; may be given more than once",
    )
    add("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line")
    add("--exact", metavar="MODEL", help="mixture-2d or mixture-64d, models without error, for a network")
    add("--guidance", type=guidance, metavar="SCALE", help="classifier-free guidance (default: 1, which is none)")
    add("--data", metavar="DIR", help="folder of the Fashion-MNIST IDX files")
    add("--solvers", nargs="+", metavar="SOLVER", help="(default: every deterministic one)")
    add("--grids", nargs="+", choices=GRIDS, default=["log_snr", "karras"], help="(default: log_snr karras)")
    add(
        "--calls",
        nargs="+",
        type=integer(1, 1_000),
        default=_CALLS,
        help=f"model calls a sample (default: {' '.join(map(str, _CALLS))})",
    )
    add("--plans", nargs="+", default=(), metavar="FILE", help="fitted plans of the model to compare too")
    add("--samples", type=integer(10, 50_000), default=200, help="samples of every run (default: %(default)s)")
    add("--batch", type=integer(1, 50_000), default=100, help="images at a time (default: %(default)s)")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="seed of the noise (default: %(default)s)")
    add(
        "--out",
        type=Path,
        default=Path("evodiff_compare"),
        metavar="DIR",
        help="folder of report and runs; a run that was stopped goes on there (default: %(default)s)",
    )


def run_compare(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax compare`.

    Args:
      args: what `add_compare_arguments` parsed.

    Raises:
      ValueError: an argument is out of range, the folder's runs are others, the model is unusable, or a batch does
        not fit in memory.
      FileNotFoundError: the model, or data that judge it, are not there.
      OSError: an output cannot be written.
    """
    if args.exact is not None:
        given = {name: getattr(args, name) for name in ("checkpoint", "guidance", "data", "prompt", "prompts")}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"argument --{name}: not with --exact, whose models have no classes and need no data")
    check_folder("--out", args.out)

    from evodiff_jax import evaluation

    if args.exact not in (None, *evaluation.MIXTURES):
        raise ValueError(f"argument --exact: must be one of {', '.join(evaluation.MIXTURES)}, got {args.exact!r}")
    for name in args.solvers or ():
        if name not in evaluation.DETERMINISTIC:
            raise ValueError(f"argument --solvers: must be of {', '.join(evaluation.DETERMINISTIC)}, got {name!r}")
    solvers = {
        name: make
        for name, make in evaluation.DETERMINISTIC.items()
        if name in (args.solvers or evaluation.DETERMINISTIC)
    }
    grids, calls = {name: GRIDS[name] for name in args.grids}, sorted(set(args.calls))
    fitted = read_plans("--plans", args.plans)
    plans = {name: found.plan for name, found in fitted.items()}
    planned = evaluation.runs(edm(), grids, calls, solvers, plans=plans)
    if len(planned) == len(plans):
        raise ValueError(f"argument --calls: {', '.join(solvers)} have no runs of {', '.join(map(str, calls))} calls")

    evaluation.check_plots()
    require("tqdm", extra="models")
    from tqdm import tqdm

    try:
        if args.exact is not None:  # exact models have no digest
            check_plans("--plans", args.plans, edm())
            batch = min(args.batch, args.samples)
            problem = evaluation.mixture(args.exact, args.samples, args.out, args.seed, batch)
        else:
            problem = _problem(args)
        made = evaluation.compare(problem, grids, calls, args.out, solvers, plans=plans)
        # disable=None: no bar unless stderr is a terminal.
        results = list(tqdm(made, total=len(planned), desc=problem.name, unit="run", leave=False, disable=None))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(f"a batch of {args.batch} does not fit in memory: use a smaller --batch") from error
        raise

    title, path = f"Solvers on {problem.name}", args.out / "report.md"
    written = evaluation.write_report(path, title, _facts(args, fitted), [(problem, results)], args.out, args.out)
    print(f"model    {problem.name}")
    print(f"judged   by {problem.judged_by}")
    print(f"runs     {len(results)} of {args.samples} samples, seed {args.seed}")
    print(f"output   {', '.join(map(str, written))}")


def _scale(args: argparse.Namespace) -> float:
    return 1.0 if args.guidance is None else args.guidance


def _problem(args: argparse.Namespace) -> Problem:
    """The model to compare solvers on, with what judges its samples."""
    from evodiff_jax import evaluation

    args.checkpoint = args.checkpoint or _PACKAGED
    model, pipeline = load_model(args, "float32")
    check_plans("--plans", args.plans, model.schedule, model.digest, {"guidance": _scale(args)})
    batch, scale = min(args.batch, args.samples), _scale(args)
    settings = (args.samples, args.out, args.seed, scale, batch)
    prompts = read_prompts(args)
    if pipeline is not None and pipeline.encoders:
        if not prompts:
            raise ValueError(f"{args.checkpoint} makes pictures of texts: give --prompt")
        return evaluation.text_model(pipeline.name, pipeline, prompts, *settings)
    if prompts:
        raise ValueError(f"argument --prompt: {args.checkpoint} has no text encoder")
    if pipeline is None and model.image_shape[2] not in (1, 3):
        raise ValueError(f"{args.checkpoint} makes images of {model.image_shape[2]} channels; a picture shows 1 or 3")
    model.denoiser(model.params, np.zeros(1, np.int32) if model.num_classes else None, scale)  # checks the scale
    decode = None if pipeline is None else lambda x: pipeline.decode(pipeline.params, x)
    return evaluation.image_model(model.name, model, *settings, args.data, decode)


def _facts(args: argparse.Namespace, fitted: Mapping[str, Fitted]) -> list[str]:
    scale = [] if args.exact is not None else [f"guidance {_scale(args):g}"]
    device = jax.devices()[0]
    versions = f"evodiff_jax {__version__}, jax {jax.__version__}, python {platform.python_version()}"
    plans = [f"plan {fact}" for fact in facts_of(fitted)]
    return [", ".join([f"seed {args.seed}", *scale]), versions, f"{device.platform}, {device.device_kind}", *plans]
