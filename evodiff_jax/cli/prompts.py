"""What `evodiff-jax sample --prompt` is asked for: prompts, seeds, sizes and pictures to start from."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evodiff_jax.cli.arguments import integer

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Pipeline

BATCH = 4
_MAX_SIDE = 8192
_MAX_SKIP = 20


class Asked(NamedTuple):
    """What the arguments name.

    Attributes:
      prompts: the texts.
      image: uint8 (H, W, 3), or None.
      mask: uint8 (H, W), or None.
    """

    prompts: list[str]
    image: np.ndarray | None
    mask: np.ndarray | None


class Job(NamedTuple):
    """The pictures to make, each with its own prompt and seed.

    Attributes:
      prompts: of each picture.
      negative: the negative prompt of each, None for none.
      seeds: of each.
      size: height and width.
      image: float32 (H, W, C) from -1 to 1 that the pictures start from, or None.
      repaint: booleans (H, W), True where the image is to be painted anew; None for everywhere.
    """

    prompts: list[str]
    negative: list[str] | None
    seeds: list[int]
    size: tuple[int, int]
    image: np.ndarray | None
    repaint: np.ndarray | None


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of models that make pictures of texts."""
    add = parser.add_argument_group("pictures of texts").add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to show; may be given more than once")
    add("--prompts", type=Path, metavar="FILE", help="a file of prompts, one a line")
    add("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add("--seeds", type=integer(0, 2**32 - 1), nargs="+", metavar="SEED", help="one a picture, in place of --seed")
    add(
        "--size", type=size_of, metavar="HxW", help="height and width in pixels (default: that of the model's training)"
    )
    add("--image", type=Path, metavar="FILE", help="picture to start from; --strength says how much of it stays")
    add("--strength", type=_strength, metavar="S", help="part of the steps run from --image on (default: 0.8)")
    add("--mask", type=Path, metavar="FILE", help="paint --image anew where this picture is white, and only there")
    add("--guidance-rescale", type=_part, default=0.0, metavar="PHI", help="bring deviations back by this part, 0 to 1")
    add(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="guide only at noise levels sigma / alpha above LOW and up to HIGH",
    )
    add("--clip-skip", type=integer(0, _MAX_SKIP), default=0, metavar="N", help="layers of the text encoders left out")
    add("--long-prompts", action="store_true", help="encode prompts of over 75 tokens in parts, not cut")
    add(
        "--original-size",
        type=size_of,
        metavar="HxW",
        help="what Stable Diffusion XL is told of the image's first size",
    )
    add("--crop", nargs=2, type=integer(0, _MAX_SIDE), default=(0, 0), metavar=("TOP", "LEFT"), help="and of its cut")
    add("--tile", type=integer(64, _MAX_SIDE), metavar="N", help="decode in tiles of N pixels, with less memory")


def check_prompt_arguments(args: argparse.Namespace) -> bool:
    """Whether pictures of texts are asked for.

    Raises:
      ValueError: arguments do not go together.
    """
    asked = args.prompt is not None or args.prompts is not None
    given = {
        "--negative-prompt": args.negative_prompt,
        "--seeds": args.seeds,
        "--size": args.size,
        "--image": args.image,
        "--strength": args.strength,
        "--mask": args.mask,
        "--guidance-interval": args.guidance_interval,
        "--original-size": args.original_size,
        "--tile": args.tile,
    }
    for option, value in given.items():
        if value is not None and not asked:
            raise ValueError(f"argument {option}: not without --prompt")
    for option, value in (("--strength", args.strength), ("--mask", args.mask)):
        if value is not None and args.image is None:
            raise ValueError(f"argument {option}: not without --image")
    refused = {
        "--class": args.label,
        "--classifier": args.classifier,
        "--config": args.config,
        "--entry": args.entry,
        "--autoencoder": args.autoencoder,
        "--npz": args.npz,
        "--plan": args.plan,
    }
    for option, value in refused.items():
        if value is not None and asked:
            raise ValueError(f"argument {option}: not with --prompt")
    return asked


def check_takes_texts(args: argparse.Namespace) -> None:
    """Raises ValueError if the checkpoint is no folder of a model of latents, before a file is read."""
    from evodiff_jax import pretrained

    folder = Path(args.checkpoint)
    if not folder.is_dir() or not pretrained.is_pipeline(folder):
        raise ValueError(
            f"argument --prompt: {args.checkpoint} has no text encoder; it needs a folder in diffusers' layout, such "
            "as one of Stable Diffusion"
        )


def load_of_texts(args: argparse.Namespace) -> Pipeline:
    """Loads a model of texts.

    Raises:
      ValueError: it has no text encoder, or is unusable.
    """
    from evodiff_jax import pretrained

    pipeline = pretrained.load_pipeline(Path(args.checkpoint), dtype=args.dtype)
    if not pipeline.encoders:
        raise ValueError(f"argument --prompt: {args.checkpoint} has no text encoder")
    return pipeline


def read_asked(args: argparse.Namespace) -> Asked:
    """Reads the prompts and pictures that the arguments name.

    Raises:
      ValueError: a file cannot be read, or is no picture.
    """
    image = None if args.image is None else _picture(args.image, "RGB")
    return Asked(read_prompts(args), image, None if args.mask is None else _picture(args.mask, "L"))


def make_job(args: argparse.Namespace, pipeline: Pipeline, asked: Asked) -> Job:
    """Checks sizes, and lays out which picture has which prompt and seed.

    Raises:
      ValueError: they do not fit the model, or one another.
    """
    prompts, image, mask = asked
    size = args.size or (pipeline.size if image is None else image.shape[:2])
    try:
        pipeline.latent_shape(size)
    except ValueError as error:
        raise ValueError(f"argument {'--size' if args.size or image is None else '--image'}: {error}") from error
    for option, picture in (("--image", image), ("--mask", mask)):
        if picture is not None and picture.shape[:2] != tuple(size):
            height, width = picture.shape[:2]
            raise ValueError(f"argument {option}: is {height} x {width} pixels, {size[0]} x {size[1]} are needed")
    if pipeline.takes_mask and mask is None:
        raise ValueError(f"{args.checkpoint} is a model of inpainting: give --image and --mask")
    shown = [prompt for prompt in prompts for _ in range(args.num or 1)]
    seeds = [args.seed + i for i in range(len(shown))] if args.seeds is None else list(args.seeds)
    if len(seeds) != len(shown):
        raise ValueError(f"argument --seeds: one a picture is needed, {len(shown)}, got {len(seeds)}")
    negative = None if args.negative_prompt is None else [args.negative_prompt] * len(shown)
    start = None if image is None else image[..., :3].astype(np.float32) / np.float32(127.5) - 1
    repaint = None if mask is None else mask > 127
    if repaint is not None and not repaint.any():
        raise ValueError("argument --mask: is black everywhere: white is what is painted anew")
    return Job(shown, negative, seeds, (int(size[0]), int(size[1])), start, repaint)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt and --prompts.

    Raises:
      ValueError: the file cannot be read, or has none.
    """
    prompts = list(args.prompt or [])
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"argument --prompts: cannot read {str(args.prompts)!r}: {reason}") from error
        prompts += [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError(f"argument --prompts: {str(args.prompts)!r} has no prompt")
    return prompts


def _picture(path: Path, mode: str) -> np.ndarray:
    from PIL import Image

    option = "--image" if mode == "RGB" else "--mask"
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert(mode))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "is no picture that can be read"
        raise ValueError(f"argument {option}: cannot read {str(path)!r}: {reason}") from error


def size_of(text: str) -> tuple[int, int]:
    """An argument's type: height and width in pixels."""
    sides = [int(part) if part.isascii() and part.isdecimal() else 0 for part in text.lower().split("x")]
    sides = sides * 2 if len(sides) == 1 else sides
    if len(sides) != 2 or not all(1 <= side <= _MAX_SIDE for side in sides):
        raise argparse.ArgumentTypeError(f"must be height and width in pixels, such as 512x768, got {text!r}")
    return sides[0], sides[1]


def _strength(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def _part(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
