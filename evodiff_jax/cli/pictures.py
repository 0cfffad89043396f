"""Pictures of texts: made from the networks of a folder, and written one after another."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax import __version__
from evodiff_jax.cli.prompts import BATCH, Job, check_takes_texts, load_of_texts, make_job, read_asked
from evodiff_jax.denoisers import counted
from evodiff_jax.editing import inpaint
from evodiff_jax.files import write_atomically
from evodiff_jax.grids import GRIDS, last_steps
from evodiff_jax.sampling import plan, sample
from evodiff_jax.solvers import FORMS
from evodiff_jax.tables import Plan

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Pipeline


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

    check_takes_texts(args)
    asked = read_asked(args)
    pipeline = load_of_texts(args)
    job = make_job(args, pipeline, asked)
    laid_out, solver = _plan_of(args, pipeline, solver, grid, steps)
    calls, paths = int(laid_out.calls), _paths(args.out, len(job.prompts))
    common = {
        "negative prompt": args.negative_prompt or "",
        "solver": solver,
        "calls": str(calls),
        "guidance": f"{args.guidance:g}",
        "model": pipeline.name,
        "digest": pipeline.digest,
        "software": f"evodiff_jax {__version__}",
    }
    started = time.perf_counter()
    try:
        # Each is written when it is there, so that what ends the run takes none away.
        for path, picture, prompt, seed in zip(
            paths, _pictures(args, pipeline, job, laid_out), job.prompts, job.seeds, strict=True
        ):
            write_atomically(path, _writer(picture, {"prompt": prompt, "seed": str(seed), **common}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise ValueError("this does not fit in memory: use --batch 1, a smaller --size, or --tile") from error
        raise
    seconds = time.perf_counter() - started

    parameters = sum(leaf.size for leaf in jax.tree.leaves(pipeline.params))
    device = jax.devices()[0]
    twice = "" if args.guidance in (0, 1) else f", {2 * calls} network evaluations, guidance {args.guidance:g}"
    print(f"model    {pipeline.name}, {parameters:,} parameters, {args.dtype or pretrained.default_dtype()}")
    print(f"solver   {solver}")
    if ignored := pipeline.network.metadata.get("ignored"):
        print(f"ignored  of scheduler_config.json: {', '.join(ignored)}")
    print(f"NFE      {calls} model calls a sample{twice}")
    print(f"pictures {len(paths)} of {job.size[0]} x {job.size[1]}, seeds {', '.join(map(str, job.seeds))}")
    print(f"time     {seconds:.1f} s with compilation")
    print(f"device   {device.platform}, {device.device_kind}")
    print(f"output   {', '.join(map(str, paths))}")


def _pictures(args: argparse.Namespace, pipeline: Pipeline, job: Job, laid_out: Plan) -> Iterator[np.ndarray]:
    """The pictures as uint8 (H, W, C), one after another, in batches of one compiled program."""
    from tqdm import tqdm

    from evodiff_jax.evaluation import to_uint8

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
            repaint = pipeline.latent_mask(pixels)
            if pipeline.takes_mask:
                text = jax.jit(pipeline.with_mask)(pipeline.params, text, job.image[None], pixels)
    count = len(job.prompts)
    rows = np.resize(np.arange(count), (-(-count // batch), batch))
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=len(rows) * int(laid_out.calls), unit="call", desc="sampling", leave=False, disable=None) as bar:
        run, decode = _programs(args, pipeline, job, repaint, None if bar.disable else lambda _: bar.update(1))
        for some in rows:
            given = jax.tree.map(lambda leaf: leaf[some], text)  # noqa: B023
            keys = jnp.stack([jax.random.key(job.seeds[i]) for i in some])
            latents = run(pipeline.params, keys, given, known, laid_out)
            for latent in latents[: count - int(some[0])]:
                x = np.asarray(decode(pipeline.params, latent[None]))[0]
                if not np.isfinite(x).all():
                    raise ValueError(f"samples are not finite: {pipeline.name} is unusable, or needs --dtype float32")
                yield _composed(np.asarray(to_uint8(x)), job)


def _programs(
    args: argparse.Namespace,
    pipeline: Pipeline,
    job: Job,
    repaint: jax.Array | None,
    on_call: Callable[[int], Any] | None,
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
        denoise = denoise if on_call is None else counted(denoise, on_call)
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


def _composed(picture: np.ndarray, job: Job) -> np.ndarray:
    """The picture with the pixels of the image, exactly, where it is not painted anew."""
    if job.image is None or job.repaint is None:
        return picture
    image = np.rint((job.image + 1) * 127.5).astype(np.uint8)
    return np.where(job.repaint[..., None], picture, image)


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
