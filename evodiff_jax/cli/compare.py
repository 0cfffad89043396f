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
from evodiff_jax.cli.output import check_folder
from evodiff_jax.cli.plans import check_plans, facts_of, read_plans
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.schedules import edm

if TYPE_CHECKING:
    from evodiff_jax.evaluation import Problem
    from evodiff_jax.fitting import Fitted
    from evodiff_jax.pretrained import Model

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
        for option, given in (("--checkpoint", args.checkpoint), ("--guidance", args.guidance), ("--data", args.data)):
            if given is not None:
                raise ValueError(f"argument {option}: not with --exact, whose models have no classes and need no data")
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
        model = _load_model(args)
        if model is None:  # exact models have no digest
            check_plans("--plans", args.plans, edm())
        else:
            check_plans("--plans", args.plans, model.schedule, model.digest, {"guidance": _scale(args)})
        problem = _problem(args, model)
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


def _load_model(args: argparse.Namespace) -> Model | None:
    """The model, None where that is an exact one."""
    if args.exact is not None:
        return None
    from evodiff_jax import pretrained

    model = pretrained.load(args.checkpoint or _PACKAGED, config=args.config, entry=args.entry)
    if model.image_shape[2] not in (1, 3):
        raise ValueError(f"{args.checkpoint} makes images of {model.image_shape[2]} channels; a picture shows 1 or 3")
    model.denoiser(model.params, np.zeros(1, np.int32) if model.num_classes else None, _scale(args))  # checks the scale
    return model


def _problem(args: argparse.Namespace, model: Model | None) -> Problem:
    from evodiff_jax import evaluation

    batch, scale = min(args.batch, args.samples), _scale(args)
    if model is None:
        return evaluation.mixture(args.exact, args.samples, args.out, args.seed, batch)
    return evaluation.image_model(model.name, model, args.samples, args.out, args.seed, scale, batch, args.data)


def _facts(args: argparse.Namespace, fitted: Mapping[str, Fitted]) -> list[str]:
    scale = [] if args.exact is not None else [f"guidance {_scale(args):g}"]
    device = jax.devices()[0]
    versions = f"evodiff_jax {__version__}, jax {jax.__version__}, python {platform.python_version()}"
    plans = [f"plan {fact}" for fact in facts_of(fitted)]
    return [", ".join([f"seed {args.seed}", *scale]), versions, f"{device.platform}, {device.device_kind}", *plans]
