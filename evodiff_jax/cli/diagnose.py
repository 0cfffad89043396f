"""`evodiff-jax diagnose`: entropy, posterior variance, zeta, eta and errors of solvers, and where calls help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from evodiff_jax.cli.arguments import integer
from evodiff_jax.cli.models import add_model_arguments, class_number, load_guided
from evodiff_jax.cli.output import check_folder, write_all
from evodiff_jax.denoisers import gaussian_mixture
from evodiff_jax.diagnostics import Density, densest_half
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.schedules import edm
from evodiff_jax.solvers import FORMS

_SOLVERS = ("variance_optimal", "evodiff", "dpm_solver_pp-2", "unipc-2")
_NAME = "diagnosis"
_PACKAGED = "fashion_mnist"


def add_diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax diagnose`."""
    add = parser.add_argument
    add_model_arguments(parser, "all in turn")
    add("--exact", metavar="MODEL", help="mixture-2d or mixture-64d, models without error, for a network")
    add("--solvers", nargs="+", default=_SOLVERS, metavar="SOLVER", help=f"(default: {' '.join(_SOLVERS)})")
    add("--grid", choices=GRIDS, default="log_snr", help="where the steps are (default: %(default)s)")
    add("--steps", type=integer(1, 1_000), default=10, help="steps (default: %(default)s)")
    add("--samples", type=integer(1, 50_000), default=32, help="samples of every run (default: %(default)s)")
    add("--batch", type=integer(1, 50_000), default=32, help="samples at a time (default: %(default)s)")
    add("--probes", type=integer(2, 10_000), default=4, help="random probes of the Jacobian (default: %(default)s)")
    add(
        "--substeps",
        type=integer(1, 1_000),
        default=20,
        help="calls of the converged trajectory a step (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("evodiff_diagnosis"),
        metavar="DIR",
        help="folder of diagnosis.md, .csv and .png (default: %(default)s)",
    )


def run_diagnose(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax diagnose`.

    Args:
      args: what `add_diagnose_arguments` parsed.

    Raises:
      ValueError: an argument is out of range, the model is unusable or not finite, or a batch does not fit in memory.
      OSError: the model cannot be read, or an output not be written.
    """
    if args.denoise_to_zero:
        raise ValueError("argument --denoise-to-zero: not here, where states are compared at the times of the steps")
    known = [name for name, form in FORMS.items() if not form.stochastic]
    for name in args.solvers:
        if name not in known:
            raise ValueError(f"argument --solvers: must be of {', '.join(known)}, got {name!r}")
    check_folder("--out", args.out)
    require("matplotlib", extra="plots")
    from evodiff_jax import diagnostics, plotting

    model = _exact(args) if args.exact is not None else _network(args)
    name, denoise, params, condition, schedule, shape = model
    batch = min(args.batch, args.samples)
    noise, probe = jax.random.split(jax.random.key(args.seed))
    try:
        found = diagnostics.diagnose(
            denoise,
            schedule.noise(jax.random.split(noise, args.samples), (args.samples, *shape)),
            schedule,
            GRIDS[args.grid](schedule, args.steps),
            {solver: FORMS[solver].make() for solver in dict.fromkeys(args.solvers)},
            key=probe,
            params=params,
            condition=condition,
            probes=args.probes,
            substeps=args.substeps,
            batch=batch,
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(f"a batch of {batch} does not fit in memory: use a smaller --batch") from error
        raise
    facts = (
        f"{args.steps} steps on the {args.grid} grid, {args.samples} samples, {args.probes} probes, seed {args.seed}. "
        "Means over samples +- 1.96 standard errors. Steps are given by the time at which they start; the state's "
        "error is that after the step. See docs/diagnostics.md for every formula."
    )
    best = _where_calls_help(next(iter(found.values())).density)
    described = f"# Solvers on {name}, step by step\n\n{facts} {best}\n\n"
    figure = plotting.diagnoses(found, f"{name}, {args.steps} steps on the {args.grid} grid")
    paths = [args.out / f"{_NAME}.{ending}" for ending in ("md", "csv", "png")]
    texts = described + diagnostics.markdown_of(found), diagnostics.csv_of(found)
    writes: dict[Path, Callable[[IO[bytes]], Any]] = {
        path: lambda file, text=text: file.write(text.encode()) for path, text in zip(paths, texts, strict=False)
    }
    writes[paths[-1]] = lambda file: figure.savefig(file, format="png")
    args.out.mkdir(exist_ok=True)
    write_all(writes)
    print(f"model    {name}")
    print(f"runs     {len(found)} solvers, {args.steps} steps, {args.samples} samples, seed {args.seed}")
    for solver, diagnosis in found.items():
        values = diagnosis.values
        entropies = np.diff(values["entropy"].mean(1))
        print(
            f"{solver:17s}final error {values['state_error'][-1].mean():.4g}, mean entropy falls in "
            f"{int((entropies < 0).sum())} of {len(entropies)} steps"
        )
    print(f"calls    {best}")
    print(f"output   {', '.join(map(str, paths))}")


def _where_calls_help(density: Mapping[int, Density]) -> str:
    """Where half of the calls of methods of each order should be, in a sentence."""
    ranges = []
    for order, found in density.items():
        ends = np.exp(-np.array(densest_half(found)))  # sigma / alpha
        ranges.append(f"{ends[0]:.2g} and {ends[1]:.2g} (order {order})")
    if not ranges:
        return "Where calls help is not known: the trajectory has too few times, or is a straight line."
    return f"Half of the calls belong between sigma/alpha {', '.join(ranges)}."


def _exact(args: argparse.Namespace) -> tuple[Any, ...]:
    """Name, denoiser, parameters, condition, schedule and shape of an exact model."""
    from evodiff_jax import evaluation

    if args.exact not in evaluation.MIXTURES:
        raise ValueError(f"argument --exact: must be one of {', '.join(evaluation.MIXTURES)}, got {args.exact!r}")
    network = ("label", "classifier", "config", "entry", "autoencoder", "dtype")
    changed = {name: getattr(args, name) is not None for name in network}
    changed |= {"checkpoint": args.checkpoint != _PACKAGED, "guidance": args.guidance != 1}
    for name, given in changed.items():
        if given:
            option = "class" if name == "label" else name
            raise ValueError(f"argument --{option}: not with --exact, whose models are no networks and have no classes")
    centers, std = evaluation.modes_of(args.exact)
    schedule = edm()
    return args.exact, gaussian_mixture(schedule, centers, std), None, None, schedule, centers.shape[1:]


def _network(args: argparse.Namespace) -> tuple[Any, ...]:
    """The same of a network, with the classes in turn where it has some."""
    guided = load_guided(args)
    labels = np.arange(args.samples, dtype=np.int32) % max(guided.num_classes, 1)
    if args.label is not None:
        labels = np.full(args.samples, class_number(args.label, guided.num_classes), np.int32)

    def denoise(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return guided.make_denoiser(params, labels)(x, t)

    model = guided.model
    return model.name + guided.words, denoise, guided.params, labels, model.schedule, model.image_shape
