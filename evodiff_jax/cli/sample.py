"""`evodiff-jax sample`: images from the packaged model, from a public checkpoint, or from a model of your own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.cli.arguments import integer
from evodiff_jax.cli.models import Guided, add_model_arguments, class_number, load_guided
from evodiff_jax.cli.output import check_output, make_picture, write_all
from evodiff_jax.cli.pictures import run_prompts
from evodiff_jax.cli.plans import origin, read_plan, warn_of_guidance
from evodiff_jax.cli.prompts import BATCH, add_prompt_arguments, check_prompt_arguments
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.sampling import plan
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Plan, denoises_to_zero

_MAX_IMAGES = 50_000  # the picture of more would be too large for common viewers
_MAX_STEPS = 1_000
_SOLVER = "variance_optimal"
_GRID = "log_snr"
_STEPS = 10
_NUM = 64
_SOLVER_HELP = (
    f"one of {', '.join(FORMS)} (default: {_SOLVER}, which had the smallest errors over the models of "
    "benchmarks/RESULTS.md); heun, dpm_2 and the like take two model calls a step"
)


class Run(NamedTuple):
    """What a run made and how long it took.

    Attributes:
      images: float32 (N, H, W, C), as sampled.
      compile_seconds: time to trace and compile.
      batch_seconds: mean time of a batch.
    """

    images: np.ndarray
    compile_seconds: float
    batch_seconds: float


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax sample`."""
    add = parser.add_argument
    add("--num", type=integer(1, _MAX_IMAGES), help=f"images (default: {_NUM}), or pictures a prompt (default: 1)")
    add("--batch", type=integer(1, _MAX_IMAGES), help=f"images at a time (default: {_NUM}, of prompts {BATCH})")
    add("--steps", type=integer(1, _MAX_STEPS), help=f"steps (default: {_STEPS})")
    add("--solver", choices=FORMS, metavar="SOLVER", help=_SOLVER_HELP)
    add("--grid", choices=GRIDS, help=f"where the steps are (default: {_GRID})")
    add("--plan", metavar="FILE", help="a fitted plan, from the command fit or packaged, in place of these three")
    add_model_arguments(parser, "all in turn")
    add("--out", type=Path, default=Path("evodiff_samples.png"), metavar="PNG", help="picture (default: %(default)s)")
    add_prompt_arguments(parser)
    add("--npz", type=Path, metavar="NPZ", help="write the images as float32 (N, H, W, C) and their labels too")


def run_sample(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax sample`.

    Args:
      args: what `add_sample_arguments` parsed.

    Raises:
      ValueError: an argument does not fit the model, the model is unusable, or a batch does not fit in memory.
      OSError: an output cannot be written, or the model not be read.
    """
    if args.plan is not None:
        for option, given in (("--steps", args.steps), ("--solver", args.solver), ("--grid", args.grid)):
            if given is not None:
                raise ValueError(f"argument {option}: not with --plan, which has its own")
    check_output("--out", args.out, ".png")
    if args.npz is not None:
        check_output("--npz", args.npz, ".npz")

    require("tqdm", "PIL", extra="models")
    if check_prompt_arguments(args):
        solver, grid = args.solver or _SOLVER, args.grid or _GRID
        return run_prompts(args, solver, grid, _STEPS if args.steps is None else args.steps)
    from evodiff_jax import evaluation

    if args.plan is not None and not denoises_to_zero(read_plan("--plan", args.plan).plan) and args.denoise_to_zero:
        raise ValueError("argument --denoise-to-zero: not with --plan, and this plan was fitted without")
    guided = load_guided(args)
    model, num = guided.model, args.num or _NUM
    batch = min(args.batch or _NUM, num)
    labels = make_labels(num, guided.num_classes, args.label)
    run_of, solver = _plan_of(args, guided)
    latents = evaluation.program_from_key(guided.make_denoiser, model.schedule, model.image_shape)
    sampler = lambda params, *others: guided.decode(params, latents(params, *others))
    try:
        run = run_batches(sampler, run_of, guided.params, jax.random.key(args.seed), labels, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(f"a batch of {batch} images does not fit in memory: use a smaller --batch") from error
        raise
    if not np.isfinite(run.images).all():
        raise ValueError(f"the samples are not finite: {args.checkpoint} is unusable, or needs other settings")

    writes: dict[Path, Callable[[IO[bytes]], Any]] = {
        args.out: lambda file: make_picture(run.images, labels).save(file, format="PNG")
    }
    if args.npz is not None:
        writes[args.npz] = lambda file: np.savez(file, images=run.images, labels=labels)
    write_all(writes)

    calls = int(run_of.calls)
    # Scales 0 and 1 need one of the two predictions only.
    evaluations = calls if args.guidance in (0, 1) else 2 * calls
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    device = jax.devices()[0]
    outputs = args.out if args.npz is None else f"{args.out}, {args.npz}"
    twice = "" if evaluations == calls else f", {evaluations} network evaluations"
    print(f"model    {model.name}, {parameters:,} parameters, {guided.dtype}")
    print(f"solver   {solver}")
    print(f"NFE      {calls} model calls a sample{twice}{guided.words}")
    print(f"images   {num} in batches of {batch}, seed {args.seed}")
    print(f"compile  {run.compile_seconds:.2f} s")
    print(f"sample   {run.batch_seconds:.3f} s a batch, {batch / run.batch_seconds:.1f} images/s")
    print(f"device   {device.platform}, {device.device_kind}")
    print(f"output   {outputs}")


def _plan_of(args: argparse.Namespace, guided: Guided) -> tuple[Plan, str]:
    """The plan that the images are made with, and what it is in words.

    Raises:
      ValueError: a fitted plan is of another model.
    """
    model = guided.model
    if args.plan is not None:
        fitted = read_plan("--plan", args.plan, model.schedule, model.digest)
        warn_of_guidance(args.plan, fitted, guided.settings)
        return fitted.plan, f"{origin(fitted)}, {args.plan}"
    solver, grid = args.solver or _SOLVER, args.grid or _GRID
    steps = _STEPS if args.steps is None else args.steps
    times = GRIDS[grid](model.schedule, steps)
    run_of = plan(model.schedule, times, FORMS[solver].make(), denoise_to_zero=args.denoise_to_zero)
    return run_of, f"{solver}, {steps} steps on the {grid} grid"


def make_labels(num: int, num_classes: int, label: str | None) -> np.ndarray:
    """The classes of `num` images: the one asked for, or all in turn.

    Args:
      num: how many.
      num_classes: classes that the model knows, 0 for an unconditional one.
      label: number or name of one class, see `class_number`, or None for all in turn.

    Returns:
      int32 (num,), zeros for an unconditional model.

    Raises:
      ValueError: as `class_number`.
    """
    if label is not None:
        return np.full(num, class_number(label, num_classes), np.int32)
    return np.arange(num, dtype=np.int32) % max(num_classes, 1)


def run_batches(
    sampler: Callable[..., jax.Array], plan: Plan, params: Any, key: jax.Array, labels: np.ndarray, batch: int
) -> Run:
    """Compiles a sampler once and runs it over all images; the last batch is filled up and trimmed.

    Args:
      sampler: from `evaluation.program_from_key`.
      plan: the plan of the run.
      params: the weights.
      key: the key of the run.
      labels: int32 (N,), the classes.
      batch: images at a time.

    Returns:
      The images and the times.
    """
    from tqdm import tqdm

    num = len(labels)
    padded = -(-num // batch) * batch
    indices = np.arange(padded, dtype=np.uint32).reshape(-1, batch)
    classes = np.resize(labels, padded).reshape(-1, batch)
    images = []
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=num, unit="image", desc="compiling", leave=False, disable=None) as bar:
        start = time.perf_counter()
        compiled = jax.jit(sampler).lower(params, key, indices[0], classes[0], plan).compile()
        compiled_at = time.perf_counter()
        bar.set_description("sampling")
        sampling = 0.0
        for i, c in zip(indices, classes, strict=True):
            started = time.perf_counter()
            x = jax.block_until_ready(compiled(params, key, i, c, plan))
            sampling += time.perf_counter() - started
            images.append(np.asarray(x))
            bar.update(min(batch, num - bar.n))
    return Run(np.concatenate(images)[:num], compiled_at - start, sampling / len(indices))
