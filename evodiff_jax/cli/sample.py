"""`evodiff-jax sample`: images from the packaged model, from a public checkpoint, or from a model of your own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.cli.arguments import add_checkpoint_arguments, guidance, integer, settings
from evodiff_jax.cli.output import check_output, make_picture
from evodiff_jax.denoisers import classifier_guidance
from evodiff_jax.extras import require
from evodiff_jax.files import write_atomically
from evodiff_jax.grids import GRIDS
from evodiff_jax.sampling import plan
from evodiff_jax.schedules import some_levels
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Plan
from evodiff_jax.types import Denoiser

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Model

_MAX_IMAGES = 50_000  # the picture of more would be too large for common viewers
_MAX_STEPS = 1_000
_DEFAULT = "variance_optimal"
_SOLVER_HELP = (
    f"one of {', '.join(FORMS)} (default: %(default)s, which had the smallest errors over the models of "
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
    add("--num", type=integer(1, _MAX_IMAGES), default=64, help="images (default: %(default)s)")
    add("--batch", type=integer(1, _MAX_IMAGES), default=64, help="images at a time (default: %(default)s)")
    add("--steps", type=integer(1, _MAX_STEPS), default=10, help="steps (default: %(default)s)")
    add("--solver", choices=FORMS, default=_DEFAULT, metavar="SOLVER", help=_SOLVER_HELP)
    add("--grid", choices=GRIDS, default="log_snr", help="where the steps are (default: %(default)s)")
    add("--class", dest="label", metavar="CLASS", help="number or name of one class (default: all in turn)")
    add(
        "--guidance",
        type=guidance,
        default=1.0,
        metavar="SCALE",
        help="classifier-free guidance (default: 1, which is none)",
    )
    add("--denoise-to-zero", action="store_true", help="end with one more model call, at the last noise level")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="seed of the noise (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the network (default: %(default)s)")
    add(
        "--checkpoint",
        default="fashion_mnist",
        metavar="PATH",
        help="model file: a public checkpoint, or what training wrote (default: the packaged model)",
    )
    add_checkpoint_arguments(parser)
    add("--classifier", metavar="PATH", help="guide by this classifier of noisy images, of guided-diffusion")
    add("--classifier-config", type=settings, metavar="JSON", help="its settings, as --config")
    add(
        "--classifier-scale",
        type=guidance,
        default=1.0,
        metavar="SCALE",
        help="scale of the classifier's guidance (default: %(default)g)",
    )
    add("--out", type=Path, default=Path("evodiff_samples.png"), metavar="PNG", help="picture (default: %(default)s)")
    add("--npz", type=Path, metavar="NPZ", help="write the images as float32 (N, H, W, C) and their labels too")


def run_sample(args: argparse.Namespace) -> None:
    """Runs `evodiff-jax sample`.

    Args:
      args: what `add_sample_arguments` parsed.

    Raises:
      ValueError: an argument does not fit the model, the model is unusable, or a batch does not fit in memory.
      OSError: an output cannot be written, or the model not be read.
    """
    check_output("--out", args.out, ".png")
    if args.npz is not None:
        check_output("--npz", args.npz, ".npz")

    if args.classifier is None and args.classifier_config is not None:
        raise ValueError("argument --classifier-config: not without --classifier")
    require("tqdm", "PIL", extra="models")
    from evodiff_jax import evaluation, pretrained

    model = pretrained.load(args.checkpoint, dtype=args.dtype, config=args.config, entry=args.entry)
    if model.image_shape[2] not in (1, 3):
        raise ValueError(f"{args.checkpoint} makes images of {model.image_shape[2]} channels; a PNG shows 1 or 3")
    batch = min(args.batch, args.num)
    classifier = None if args.classifier is None else load_guide(args.classifier, args.classifier_config, model)
    labels = make_labels(args.num, (classifier or model).num_classes, args.label)
    times = GRIDS[args.grid](model.schedule, args.steps)
    run_of = plan(model.schedule, times, FORMS[args.solver].make(), denoise_to_zero=args.denoise_to_zero)
    params = model.params, None if classifier is None else classifier.params
    make_denoiser = denoisers_of(model, args.guidance, classifier, args.classifier_scale)
    make_denoiser(params, labels[:batch])  # so that what does not fit is known before anything is compiled
    sampler = evaluation.program_from_key(make_denoiser, model.schedule, model.image_shape)
    try:
        run = run_batches(sampler, run_of, params, jax.random.key(args.seed), labels, batch)
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
    guided = "" if args.guidance == 1 else f" ({evaluations} network evaluations, guidance {args.guidance:g})"
    if classifier is not None:
        guided += f", guided by {classifier.name}, scale {args.classifier_scale:g}"
    print(f"model    {model.name}, {parameters:,} parameters, {args.dtype}")
    print(f"solver   {args.solver}, {args.steps} steps on the {args.grid} grid")
    print(f"NFE      {calls} model calls a sample{guided}")
    print(f"images   {args.num} in batches of {batch}, seed {args.seed}")
    print(f"compile  {run.compile_seconds:.2f} s")
    print(f"sample   {run.batch_seconds:.3f} s a batch, {batch / run.batch_seconds:.1f} images/s")
    print(f"device   {device.platform}, {device.device_kind}")
    print(f"output   {outputs}")


def make_labels(num: int, num_classes: int, label: str | None) -> np.ndarray:
    """The classes of `num` images.

    Args:
      num: how many.
      num_classes: classes that the model knows, 0 for an unconditional one.
      label: number or name of one class, or None for all classes in turn. Names are Fashion-MNIST's; case, spaces
        and punctuation do not matter.

    Returns:
      int32 (num,), zeros for an unconditional model.

    Raises:
      ValueError: there is no such class, or there are none.
    """
    from evodiff_jax.evaluation.data import CLASS_NAMES

    if num_classes == 0:
        if label is not None:
            raise ValueError(f"argument --class: not for an unconditional model, got {label!r}")
        return np.zeros(num, np.int32)
    if label is None:
        return np.arange(num, dtype=np.int32) % num_classes
    names = {_letters(name): i for i, name in enumerate(CLASS_NAMES)} if num_classes == len(CLASS_NAMES) else {}
    chosen = int(label) if label.isascii() and label.isdecimal() else names.get(_letters(label), -1)
    if not 0 <= chosen < num_classes:
        named = f" or one of {', '.join(CLASS_NAMES)}" if names else ""
        raise ValueError(f"argument --class: must be in 0 .. {num_classes - 1}{named}, got {label!r}")
    return np.full(num, chosen, np.int32)


def load_guide(path: str, config: dict[str, Any] | None, model: Model) -> Model:
    """Loads the classifier that guides a model.

    Raises:
      ValueError: it is no classifier of noisy images, or of other images, classes or noise than the model's.
    """
    from evodiff_jax import pretrained

    classifier = pretrained.load(path, config=config)
    if classifier.network.prediction != "class":
        raise ValueError(f"argument --classifier: {path} ({classifier.cls}) is no classifier of noisy images")
    for what in ("image_shape", "num_classes"):
        ours, theirs = getattr(model, what), getattr(classifier, what)
        if ours != theirs and ours != 0:  # a model without classes is guided to those of any classifier
            raise ValueError(f"argument --classifier: {path} has {what} {theirs}, the model {ours}")
    if some_levels(classifier.schedule) != some_levels(model.schedule):
        raise ValueError(f"argument --classifier: {path} was trained on the noise of another schedule than the model")
    return classifier


def denoisers_of(
    model: Model, guidance: float, classifier: Model | None, classifier_scale: float
) -> Callable[[Any, Any], Denoiser]:
    """Returns (params of model and classifier, labels) -> denoise(x, t), guided as asked for."""

    def make_denoiser(params: Any, labels: Any) -> Denoiser:
        denoise = model.denoiser(params[0], labels if model.num_classes else None, guidance)
        if classifier is None:
            return denoise
        log_prob = classifier.log_prob(params[1], labels)
        return classifier_guidance(denoise, log_prob, model.schedule, classifier_scale)

    return make_denoiser


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


def write_all(writes: dict[Path, Callable[[IO[bytes]], Any]]) -> None:
    """Writes as many of the files as can be written.

    Raises:
      OSError: one or more could not be written; the message names all of them.
    """
    failures: list[OSError] = []
    for path, write in writes.items():
        try:
            write_atomically(path, write)
        except OSError as error:
            failures.append(error)
    if failures:
        raise OSError("; ".join(map(str, failures))) from failures[0]


def _letters(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
