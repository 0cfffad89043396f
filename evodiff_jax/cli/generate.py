"""`evodiff-jax generate`: many images, written as they are made, by a run that can be stopped at any time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from evodiff_jax import interrupts
from evodiff_jax.cli.arguments import integer
from evodiff_jax.cli.models import add_model_arguments
from evodiff_jax.cli.plans import origin, read_plan, warn_of_guidance
from evodiff_jax.cli.prompts import size_of
from evodiff_jax.cli.tasks import Task, load_task
from evodiff_jax.extras import require
from evodiff_jax.grids import GRIDS
from evodiff_jax.sampling import plan
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Plan, denoises_to_zero

if TYPE_CHECKING:
    from evodiff_jax.generation import Made

_CHECKPOINT = "fashion_mnist"
_MAX_NUM = 2**32
_MAX_STEPS = 1_000
_MAX_HOSTS = 100_000
_BATCH = 64
_SOLVER, _GRID, _STEPS = "variance_optimal", "log_snr", 10


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evodiff-jax generate`."""
    add = parser.add_argument
    add("--num", type=integer(1, _MAX_NUM), default=50_000, help="images (default: %(default)s)")
    add("--batch", type=integer(1, _MAX_NUM), help=f"images at a time, over all devices of a host (default: {_BATCH})")
    add("--chunk", type=integer(1, _MAX_NUM), help="images that are written at a time (default: a batch)")
    add("--steps", type=integer(1, _MAX_STEPS), help=f"steps (default: {_STEPS})")
    add("--solver", choices=FORMS, metavar="SOLVER", help=f"one of {', '.join(FORMS)} (default: {_SOLVER})")
    add("--grid", choices=GRIDS, help=f"where the steps are (default: {_GRID})")
    add("--plan", metavar="FILE", help="a fitted plan, from the command fit or packaged, in place of these three")
    add("--model", metavar="MODULE:FACTORY", help="your own model, in place of --checkpoint; see docs/generation.md")
    add_model_arguments(parser, "all in turn")
    add("--random-classes", action="store_true", help="classes drawn at random, as evaluate does, not all in turn")
    add("--prompt", action="append", metavar="TEXT", help="what to show; may be given more than once, shown in turn")
    add("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line")
    add("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add("--size", type=size_of, metavar="HxW", help="of pictures of texts, in pixels (default: that of the training)")
    add(
        "--uint8",
        choices=("edm", "guided_diffusion", "diffusers"),
        help="how samples become bytes, see docs/fid.md (default: as the checkpoint's project does it)",
    )
    add(
        "--out",
        default="evodiff_images",
        metavar="DIR",
        help="new or empty folder, or a URL of TensorStore such as gs://bucket/folder; the same command goes on there "
        "(default: %(default)s)",
    )
    hosts = parser.add_argument_group("several hosts, each of which is given the same command").add_argument
    hosts("--coordinator", metavar="ADDRESS:PORT", help="of host 0, which listens there")
    hosts("--num-hosts", type=integer(1, _MAX_HOSTS), metavar="N", help="how many there are")
    hosts("--host", type=integer(0, _MAX_HOSTS), metavar="I", help="the number of this one, 0 to N - 1")
    hosts("--distributed", action="store_true", help="all three as JAX finds them, on a TPU pod, Slurm and others")
    hosts(
        "--host-timeout",
        type=integer(10, 3600),
        default=100,
        metavar="SECONDS",
        help="until all must be there, and after which a host that is not heard of counts as dead (default: 100)",
    )


def run_generate(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax generate`.

    Args:
      args: what `add_generate_arguments` parsed.

    Raises:
      ValueError: an argument is out of range or does not fit the model, the place is another run's, or a batch does not
        fit in memory.
      OSError: a file cannot be read or the place not be written to; complete chunks stay.
      KeyboardInterrupt: Ctrl-C or SIGTERM ended the run; complete chunks stay.
    """
    _check_options(args)
    require("tqdm", extra="generate")
    from evodiff_jax import generation

    try:
        generation.check(args.out)
    except ValueError as error:
        raise ValueError(f"argument --out: {error}") from error
    if args.plan is not None and not denoises_to_zero(read_plan("--plan", args.plan).plan) and args.denoise_to_zero:
        raise ValueError("argument --denoise-to-zero: not with --plan, and this plan was fitted without")
    if args.coordinator is not None or args.distributed:
        generation.join(args.coordinator, args.num_hosts, args.host, args.host_timeout)
    hosts = generation.Hosts()
    try:
        batch = _batch_of(args)
        task = load_task(args)
        laid_out, solver = _plan_of(args, task)
        made = _generate(args, task, laid_out, batch, hosts.index, hosts.count)
    except jax.errors.JaxRuntimeError as error:
        hosts.fail(str(error))
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError(f"a batch does not fit in memory: use a smaller --batch; {error}") from error
        raise
    except BaseException as error:
        hosts.fail(str(error) or type(error).__name__)
        raise
    if hosts.index == 0:
        _tell(args, task, int(laid_out.calls), solver, batch, hosts.count, made)


def _check_options(args: argparse.Namespace) -> None:
    """Raises ValueError where options do not go together."""
    given = {
        "--config": args.config,
        "--entry": args.entry,
        "--autoencoder": args.autoencoder,
        "--classifier": args.classifier,
        "--class": args.label,
    }
    asked = args.prompt is not None or args.prompts is not None
    own = {**given, "--dtype": args.dtype, "--prompt": args.prompt, "--prompts": args.prompts}
    own |= {
        "--guidance": None if args.guidance == 1 else args.guidance,
        "--random-classes": args.random_classes or None,
    }
    own |= {"--checkpoint": None if args.checkpoint == _CHECKPOINT else args.checkpoint}
    texts = {**given, "--plan": args.plan, "--random-classes": args.random_classes or None}
    for other, there, options in (("--model", args.model is not None, own), ("--prompt", asked, texts)):
        for option, value in options.items():
            if there and value is not None:
                raise ValueError(f"argument {option}: not with {other}")
    for option, value in (("--negative-prompt", args.negative_prompt), ("--size", args.size)):
        if value is not None and not asked:
            raise ValueError(f"argument {option}: not without --prompt")
    if args.label is not None and args.random_classes:
        raise ValueError("argument --random-classes: not with --class")
    if args.plan is not None:
        for option, value in (("--steps", args.steps), ("--solver", args.solver), ("--grid", args.grid)):
            if value is not None:
                raise ValueError(f"argument {option}: not with --plan, which has its own")
    if args.chunk is not None and args.chunk > args.num:
        raise ValueError(f"argument --chunk: must be at most the {args.num} images, got {args.chunk}")
    hosts = {"--coordinator": args.coordinator, "--num-hosts": args.num_hosts, "--host": args.host}
    for option, value in hosts.items():
        if args.distributed and value is not None:
            raise ValueError(f"argument {option}: not with --distributed, which finds it")
    for option, value in hosts.items():
        if value is None and any(other is not None for other in hosts.values()):
            raise ValueError(f"argument {option}: is needed too, as {', '.join(hosts)} go together")
    if args.host is not None and args.host >= args.num_hosts:
        raise ValueError(f"argument --host: must be in 0 .. {args.num_hosts - 1} of {args.num_hosts}, got {args.host}")


def _batch_of(args: argparse.Namespace) -> int:
    """The batch: no more than there are images, in whole numbers a device."""
    devices = jax.local_device_count()
    whole = lambda count: -(-count // devices) * devices
    if args.batch is None:
        return min(whole(_BATCH), whole(args.num))
    if args.batch % devices:
        nearest = max(1, round(args.batch / devices)) * devices
        raise ValueError(
            f"argument --batch: {args.batch} cannot be divided among {devices} devices; {nearest} can, the nearest"
        )
    return min(args.batch, whole(args.num))


def _plan_of(args: argparse.Namespace, task: Task) -> tuple[Plan, str]:
    """The plan that the images are made with, and what it is in words.

    Raises:
      ValueError: a fitted plan is of another model.
    """
    schedule = task.source.schedule
    if args.plan is not None:
        fitted = read_plan("--plan", args.plan, schedule, task.digest)
        if task.settings is not None:
            warn_of_guidance(args.plan, fitted, task.settings)
        return fitted.plan, f"{origin(fitted)}, {args.plan}"
    solver, grid = args.solver or _SOLVER, args.grid or _GRID
    steps = _STEPS if args.steps is None else args.steps
    made = plan(schedule, GRIDS[grid](schedule, steps), FORMS[solver].make(), denoise_to_zero=args.denoise_to_zero)
    return made, f"{solver}, {steps} steps on the {grid} grid"


def _generate(args: argparse.Namespace, task: Task, laid_out: Plan, batch: int, host: int, count: int) -> Made:
    """Makes the images, with a bar on host 0 for its own part."""
    from tqdm import tqdm

    from evodiff_jax import generation

    calls = int(laid_out.calls) * (2 if task.twice else 1)
    share = -(-args.num // count)
    # disable=None: no bar unless stderr is a terminal.
    bar = tqdm(total=share, unit="image", desc="compiling", leave=False, disable=None if host == 0 else True)
    written = 0
    with bar, interrupts.postponed() as check:

        def on_batch(some: int, nbytes: int) -> None:
            nonlocal written
            check()
            if nbytes:
                written += nbytes
                bar.set_description("sampling" if count == 1 else f"sampling on host 0 of {count}", refresh=False)
                bar.update(some)
                bar.set_postfix(NFE=f"{bar.n * calls:,}", bytes=f"{written:,}", refresh=False)
            elif some:
                bar.total = max(bar.total - some, bar.n)

        return generation.generate(
            task.source,
            laid_out,
            args.out,
            args.num,
            seed=args.seed,
            batch=batch,
            chunk=args.chunk,
            uint8=task.uint8,
            on_batch=on_batch,
        )


def _tell(args: argparse.Namespace, task: Task, calls: int, solver: str, batch: int, count: int, made: Made) -> None:
    """Prints what was done."""
    device = jax.local_devices()[0]
    devices = jax.local_device_count()
    twice = f", {2 * calls} network evaluations" if task.twice else ""
    share = "" if count == 1 else f" on host 0 of {count}"
    print(f"model    {task.words}")
    print(f"solver   {solver}")
    print(f"NFE      {calls} model calls a sample{twice}")
    print(f"images   {args.num:,} in batches of {batch}, seed {args.seed}; {made.made:,} made now{share}")
    if made.kept or made.damaged:
        print(f"before   {made.kept:,} chunks complete, {len(made.damaged)} damaged and made anew")
    if made.made:
        rate, speed = made.made / made.seconds, made.nbytes / made.seconds / 1e6
        print(f"compile  {made.compile_seconds:.2f} s")
        print(f"sample   {made.seconds:.1f} s, {rate:.1f} images/s, {speed:.2f} MB/s{share}")
    if made.not_finite:
        print(f"note     {made.not_finite:,} samples are not finite; their images are gray")
    print(f"device   {devices} x {device.platform}, {device.device_kind}")
    print(f"output   {args.out}")
