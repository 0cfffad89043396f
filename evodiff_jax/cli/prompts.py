"""`evodiff-jax sample --prompt`: pictures of texts, from a folder in the layout of diffusers."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax import __version__
from evodiff_jax.cli.arguments import integer
from evodiff_jax.cli.output import write_all
from evodiff_jax.editing import inpaint
from evodiff_jax.grids import GRIDS, last_steps
from evodiff_jax.sampling import plan, sample
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Plan

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Pipeline

BATCH = 4
_MAX_SIDE = 8192
_MAX_SKIP = 20


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


def run_prompts(args: argparse.Namespace, solver: str, grid: str, steps: int) -> None:
    """Makes the pictures and writes them.

    Args:
      args: what `add_sample_arguments` parsed.
      solver: its name.
      grid: the grid's name.
      steps: of a run from pure noise.

    Raises:
      ValueError: the folder is no model of texts, or an argument does not fit it.
      OSError: a file cannot be read or written.
    """
    from evodiff_jax import pretrained

    folder = Path(args.checkpoint)
    if not folder.is_dir() or not pretrained.is_pipeline(folder):
        raise ValueError(
            f"argument --prompt: {args.checkpoint} has no text encoder; it needs a folder in diffusers' layout, such "
            "as one of Stable Diffusion"
        )
    prompts = read_prompts(args)
    image = None if args.image is None else _picture(args.image, "RGB")
    mask = None if args.mask is None else _picture(args.mask, "L")
    pipeline = pretrained.load_pipeline(folder, dtype=args.dtype)
    job = _job(args, pipeline, prompts, image, mask)
    laid_out, solver = _plan_of(args, pipeline, solver, grid, steps)
    started = time.perf_counter()
    pictures = make_pictures(args, pipeline, job, laid_out)
    seconds = time.perf_counter() - started

    calls = int(laid_out.calls)
    paths = _paths(args.out, len(pictures))
    common = {
        "negative prompt": args.negative_prompt or "",
        "solver": solver,
        "calls": str(calls),
        "guidance": f"{args.guidance:g}",
        "model": pipeline.name,
        "digest": pipeline.digest,
        "software": f"evodiff_jax {__version__}",
    }
    writes: dict[Path, Callable[[IO[bytes]], Any]] = {}
    for path, picture, prompt, seed in zip(paths, pictures, job.prompts, job.seeds, strict=True):
        writes[path] = _writer(picture, {"prompt": prompt, "seed": str(seed), **common})
    write_all(writes)

    parameters = sum(leaf.size for leaf in jax.tree.leaves(pipeline.params))
    device = jax.devices()[0]
    twice = "" if args.guidance in (0, 1) else f", {2 * calls} network evaluations, guidance {args.guidance:g}"
    print(f"model    {pipeline.name}, {parameters:,} parameters, {args.dtype or pretrained.default_dtype()}")
    print(f"solver   {solver}")
    print(f"NFE      {calls} model calls a sample{twice}")
    print(f"pictures {len(pictures)} of {job.size[0]} x {job.size[1]}, seeds {', '.join(map(str, job.seeds))}")
    print(f"time     {seconds:.1f} s with compilation")
    print(f"device   {device.platform}, {device.device_kind}")
    print(f"output   {', '.join(map(str, paths))}")


def make_pictures(args: argparse.Namespace, pipeline: Pipeline, job: Job, laid_out: Plan) -> list[np.ndarray]:
    """The pictures as uint8 (H, W, C), in batches of one compiled program."""
    from tqdm import tqdm

    from evodiff_jax.evaluation import to_uint8
    from evodiff_jax.pretrained.pipeline import blocks_any

    batch = min(args.batch or BATCH, len(job.prompts))
    text = pipeline.text(
        pipeline.params,
        job.prompts,
        job.negative,
        size=job.size,
        original_size=args.original_size,
        crop=tuple(args.crop),
        clip_skip=args.clip_skip,
        chunks=args.long_prompts,
    )
    known = repaint = None
    if job.image is not None:
        known = jax.jit(pipeline.encode)(pipeline.params, job.image[None])
        if job.repaint is not None:
            pixels = jnp.asarray(job.repaint)[None, :, :, None]
            repaint = blocks_any(pixels, pipeline.factor)
            if pipeline.takes_mask:
                text = jax.jit(pipeline.with_mask)(pipeline.params, text, job.image[None], pixels)
    run, decode = _programs(args, pipeline, job, repaint)
    rows = np.resize(np.arange(len(job.prompts)), (-(-len(job.prompts) // batch), batch))
    pictures: list[np.ndarray] = []
    with tqdm(total=len(job.prompts), unit="picture", desc="sampling", leave=False, disable=None) as bar:
        for some in rows:
            given = jax.tree.map(lambda leaf: leaf[some], text)  # noqa: B023
            keys = jnp.stack([jax.random.key(job.seeds[i]) for i in some])
            latents = run(pipeline.params, keys, given, known, laid_out)
            for latent in latents[: len(job.prompts) - len(pictures)]:
                x = np.asarray(decode(pipeline.params, latent[None]))[0]
                if not np.isfinite(x).all():
                    raise ValueError(f"samples are not finite: {pipeline.name} is unusable, or needs --dtype float32")
                pictures.append(_composed(np.asarray(to_uint8(x)), job))
                bar.update(1)
    return pictures


def _programs(
    args: argparse.Namespace, pipeline: Pipeline, job: Job, repaint: jax.Array | None
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The compiled functions from keys and texts to latents, and from latents to images."""
    shape, schedule = pipeline.latent_shape(job.size), pipeline.schedule

    def run(params: Any, keys: jax.Array, text: Any, known: Any, laid_out: Plan) -> jax.Array:
        of_noise, of_run, of_mask = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        denoise = pipeline.denoiser(
            params,
            text,
            args.guidance,
            rescale=args.guidance_rescale,
            interval=args.guidance_interval,
        )
        on_state = None
        start = jnp.zeros((len(keys), *shape)) if known is None else jnp.broadcast_to(known, (len(keys), *shape))
        x_T = schedule.add_noise(start, laid_out.table.time[0], of_noise)
        if repaint is not None and not pipeline.takes_mask:
            denoise, on_state = inpaint(denoise, known, ~repaint, schedule, key=of_mask)
        return sample(denoise, x_T, laid_out, key=of_run, on_state=on_state)

    return jax.jit(run), jax.jit(lambda params, latents: pipeline.decode(params, latents, args.tile))


def _plan_of(args: argparse.Namespace, pipeline: Pipeline, solver: str, grid: str, steps: int) -> tuple[Plan, str]:
    """The plan of a run; from an image on only the last part of its steps."""
    times = GRIDS[grid](pipeline.schedule, steps)
    words = f"{solver}, {steps} steps on the {grid} grid"
    if args.image is not None:
        strength = (1.0 if args.mask is not None else 0.8) if args.strength is None else args.strength
        times = last_steps(times, strength)
        words += f", the last {len(times) - 1} of them from the image"
    made = plan(pipeline.schedule, times, FORMS[solver].make(), denoise_to_zero=args.denoise_to_zero)
    return made, words


def _job(
    args: argparse.Namespace, pipeline: Pipeline, prompts: list[str], image: np.ndarray | None, mask: np.ndarray | None
) -> Job:
    """Checks sizes, and lays out which picture has which prompt and seed."""
    if not pipeline.encoders:
        raise ValueError(f"argument --prompt: {args.checkpoint} has no text encoder")
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


def _composed(picture: np.ndarray, job: Job) -> np.ndarray:
    """The picture with the pixels of the image, exactly, where it is not painted anew."""
    if job.image is None or job.repaint is None:
        return picture
    image = np.rint((job.image + 1) * 127.5).astype(np.uint8)
    return np.where(job.repaint[..., None], picture, image)


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


def _paths(out: Path, count: int) -> list[Path]:
    """One file a picture, numbered where there are several."""
    if count == 1:
        return [out]
    digits = len(str(count - 1))
    return [out.with_name(f"{out.stem}-{i:0{digits}}{out.suffix}") for i in range(count)]


def _writer(picture: np.ndarray, facts: dict[str, str]) -> Callable[[IO[bytes]], Any]:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in facts.items():
        info.add_itxt(name, value)
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    return lambda file: image.save(file, format="PNG", pnginfo=info)


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
