"""The model that a command samples from: its arguments, and the model with what guides it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from evodiff_jax.cli.arguments import add_checkpoint_arguments, guidance, integer, settings
from evodiff_jax.denoisers import classifier_guidance
from evodiff_jax.schedules import some_levels
from evodiff_jax.types import Denoiser

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Model, Pipeline


class Guided(NamedTuple):
    """A model, and the classifier that guides it.

    Attributes:
      model: the diffusion model.
      classifier: the classifier of noisy images, or None.
      params: the parameters of both, and of the autoencoder.
      num_classes: how many classes there are to ask for, 0 for none.
      make_denoiser: make_denoiser(params, labels) -> denoise(x, t); labels are not read where there are no classes.
      words: how it is guided, "" where it is not.
      settings: the same for a store of runs.
      dtype: what the network computes in, by name.
      decode: decode(params, x) -> the images of samples, one after another; x itself for a model of pixels.
    """

    model: Model
    classifier: Model | None
    params: Any
    num_classes: int
    make_denoiser: Callable[[Any, Any], Denoiser]
    words: str
    settings: dict[str, Any]
    dtype: str
    decode: Callable[[Any, jax.Array], jax.Array]


def add_model_arguments(parser: argparse.ArgumentParser, classes: str) -> None:
    """Adds the arguments that say what is sampled; `classes` says which classes are unless one is asked for."""
    add = parser.add_argument
    add(
        "--checkpoint",
        default="fashion_mnist",
        metavar="PATH",
        help="model: a public checkpoint, a folder in diffusers' layout, or what training wrote (default: the packaged "
        "model)",
    )
    add_checkpoint_arguments(parser)
    add("--autoencoder", metavar="PATH", help="folder of the autoencoder, for a file of a model of latents such as DiT")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the network (default: float32, of folders on accelerators bfloat16)",
    )
    add("--class", dest="label", metavar="CLASS", help=f"number or name of one class (default: {classes})")
    scale = {"type": guidance, "default": 1.0, "metavar": "SCALE"}
    add("--guidance", help="classifier-free guidance (default: 1, which is none)", **scale)
    add("--classifier", metavar="PATH", help="guide by this classifier of noisy images, of guided-diffusion")
    add("--classifier-config", type=settings, metavar="JSON", help="its settings, as --config")
    add("--classifier-scale", help="scale of the classifier's guidance (default: %(default)g)", **scale)
    add("--denoise-to-zero", action="store_true", help="end with one more model call, at the last noise level")
    add("--seed", type=integer(0, 2**32 - 1), default=0, help="seed of all that is random (default: %(default)s)")


def load_guided(args: argparse.Namespace) -> Guided:
    """Loads what `add_model_arguments` parsed.

    Raises:
      OSError: a file cannot be read.
      ValueError: a file is unusable, or the model can't be guided so.
    """
    from evodiff_jax import pretrained

    if args.classifier is None and args.classifier_config is not None:
        raise ValueError("argument --classifier-config: not without --classifier")
    dtype = args.dtype or (pretrained.default_dtype() if Path(args.checkpoint).is_dir() else "float32")
    model, pipeline = load_model(args, dtype)
    if pipeline is not None and pipeline.encoders:
        raise ValueError(f"{args.checkpoint} makes pictures of texts: give --prompt, which the command sample has")
    if pipeline is None and model.image_shape[2] not in (1, 3):
        channels = model.image_shape[2]
        raise ValueError(
            f"{args.checkpoint} makes images of {channels} channels; a PNG shows 1 or 3: if they are latents, give "
            "--autoencoder"
        )
    classifier = None
    if args.classifier is not None:
        classifier = _checked(pretrained.load(args.classifier, config=args.classifier_config), model)
    classes = (classifier or model).num_classes

    def make_denoiser(params: Any, labels: Any) -> Denoiser:
        denoise = model.denoiser(params[0], labels if model.num_classes else None, args.guidance)
        if classifier is None:
            return denoise
        log_prob = classifier.log_prob(params[1], labels)
        return classifier_guidance(denoise, log_prob, model.schedule, args.classifier_scale)

    def decode(params: Any, x: jax.Array) -> jax.Array:
        return x if pipeline is None else pipeline.decode_each({"autoencoder": params[2]}, x)

    of_autoencoder = None if pipeline is None else pipeline.autoencoder.params
    params = model.params, None if classifier is None else classifier.params, of_autoencoder
    make_denoiser(params, np.zeros(1, np.int32))  # so that what does not fit is known before anything is compiled
    words = "" if args.guidance == 1 else f", guidance {args.guidance:g}"
    described: dict[str, Any] = {"guidance": args.guidance}
    if pipeline is not None:
        described["autoencoder"] = pipeline.autoencoder.digest
    if classifier is not None:
        words += f", guided by {classifier.name}, scale {args.classifier_scale:g}"
        described |= {"classifier": classifier.digest, "classifier_scale": args.classifier_scale}
    return Guided(model, classifier, params, classes, make_denoiser, words, described, dtype, decode)


def load_model(args: argparse.Namespace, dtype: str) -> tuple[Model, Pipeline | None]:
    """The model, and for one of latents the pipeline with its autoencoder."""
    from evodiff_jax import pretrained

    path = Path(args.checkpoint)
    if path.is_dir() and pretrained.is_pipeline(path):
        for option, given in (("--config", args.config), ("--entry", args.entry), ("--autoencoder", args.autoencoder)):
            if given is not None:
                raise ValueError(f"argument {option}: not with {path}, a folder that has all that it needs")
        pipeline = pretrained.load_pipeline(path, dtype=dtype)
        return pipeline.network, pipeline
    model = pretrained.load(args.checkpoint, dtype=dtype, config=args.config, entry=args.entry)
    if args.autoencoder is None:
        return model, None
    return model, pretrained.with_autoencoder(model, pretrained.load(args.autoencoder, dtype=dtype))


def class_number(label: str, num_classes: int) -> int:
    """The class that is asked for.

    Args:
      label: its number or name. Names are Fashion-MNIST's; case, spaces and punctuation do not matter.
      num_classes: classes that the model knows, 0 for an unconditional one.

    Raises:
      ValueError: there is no such class, or there are none.
    """
    from evodiff_jax.evaluation.data import CLASS_NAMES

    if num_classes == 0:
        raise ValueError(f"argument --class: not for an unconditional model, got {label!r}")
    names = {_letters(name): i for i, name in enumerate(CLASS_NAMES)} if num_classes == len(CLASS_NAMES) else {}
    chosen = int(label) if label.isascii() and label.isdecimal() else names.get(_letters(label), -1)
    if not 0 <= chosen < num_classes:
        named = f" or one of {', '.join(CLASS_NAMES)}" if names else ""
        raise ValueError(f"argument --class: must be in 0 .. {num_classes - 1}{named}, got {label!r}")
    return chosen


def _checked(classifier: Model, model: Model) -> Model:
    """The classifier, if it is one of the model's noisy images."""
    option, name = "argument --classifier", classifier.name
    if classifier.network.prediction != "class":
        raise ValueError(f"{option}: {name} ({classifier.cls}) is no classifier of noisy images")
    for what in ("image_shape", "num_classes"):
        ours, theirs = getattr(model, what), getattr(classifier, what)
        if ours != theirs and ours != 0:  # a model without classes is guided to those of any classifier
            raise ValueError(f"{option}: {name} has {what} {theirs}, the model {ours}")
    if some_levels(classifier.schedule) != some_levels(model.schedule):
        raise ValueError(f"{option}: {name} was trained on the noise of another schedule than the model")
    return classifier


def _letters(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
