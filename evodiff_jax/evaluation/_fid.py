"""FID of solvers: samples become features batch by batch, and of these no more than mean and covariance is kept.

A folder of runs, beside its settings (see `check_store`):

{solver}_{grid}_{calls}_{digest}.npz    `mu` and `sigma`, a file of statistics as others write them; while the run goes
                                        on, where it is
reference_{digest}.npz                  the same of the images of a reference file
figures.jsonl                           distances
"""

import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.evaluation._reference import DAMAGES, Reference, stored_rows
from evodiff_jax.evaluation._runs import Run, runs
from evodiff_jax.evaluation._statistics import Statistics, include, no_statistics
from evodiff_jax.evaluation._store import Figures, check_store, path_of
from evodiff_jax.evaluation.metrics import frechet_distance_of_statistics
from evodiff_jax.files import write_atomically
from evodiff_jax.generation import UINT8, Source, digest_of_params, images_from_key
from evodiff_jax.grids import Grid
from evodiff_jax.sampling import plan
from evodiff_jax.tables import Plan, Solver, stack
from evodiff_jax.types import Denoiser

if TYPE_CHECKING:
    from evodiff_jax.pretrained import Model

SAVE_SECONDS = 30.0
"""How often a run in progress is stored; a run that is stopped loses as much at most."""

Features = Callable[[Any], Any]
"""features(images) -> (B, D), of uint8 images (B, H, W, 3) on the device."""


class Fid(NamedTuple):
    """The FID of a solver on one grid at one number of model calls, or of a fitted plan.

    Attributes:
      solver: the solver's name, or the plan's.
      grid: the grid's name, FITTED of a plan.
      calls: the number of model calls of a sample.
      value: the distance, infinite where a sample is not finite.
      samples: the number of samples.
      blown_up: the number of them that are not finite.
      digest: of the solver, see `digest_of_plan`.
    """

    solver: str
    grid: str
    calls: int
    value: float
    samples: int
    blown_up: int
    digest: str


class _Tally(NamedTuple):
    """A run in progress: the statistics of its samples, and the number of those that are not finite."""

    statistics: Statistics
    blown_up: int


class _Made(NamedTuple):
    """A finished run: the statistics of its finite samples, their number, and that of the others."""

    mean: np.ndarray
    covariance: np.ndarray
    samples: int
    blown_up: int


_KEYS = ("mu", "sigma", "samples", "blown_up")  # of a finished run, in the order of _Made


def source_of(
    model: "Model",
    guidance: float = 1.0,
    label: int | None = None,
    decode: Callable[[Any, jax.Array], jax.Array] | None = None,
) -> Source:
    """A pretrained model as a source of samples.

    Args:
      model: from `pretrained.load`.
      guidance: scale of classifier-free guidance, see `Model.denoiser`.
      label: as for `Source`.
      decode: as for `Source`, for a model of latents.

    Raises:
      ValueError: it is no diffusion model of images with one or three channels, has no such class, or can't be guided.
    """
    if model.network.predict is None:
        raise ValueError(f"{model.name} ({model.cls}) is no diffusion model, it predicts: {model.network.prediction}")
    if decode is None and model.image_shape[2] not in (1, 3):
        raise ValueError(f"{model.name} makes images of {model.image_shape[2]} channels, FID is of images with 1 or 3")

    def make_denoiser(params: Any, labels: Any) -> Denoiser:
        return model.denoiser(params, labels, guidance)

    classes = model.num_classes
    make_denoiser(model.params, np.full(1, label or 0, np.int32) if classes or label is not None else None)
    settings = {**settings_of(model), "guidance": float(guidance)}
    source = Source(make_denoiser, model.params, model.schedule, model.image_shape, classes, label, settings)
    return source._replace(decode=decode)


def settings_of(model: "Model") -> dict[str, Any]:
    """What a model is, as JSON for `Source.settings`."""
    # Addresses of objects, such as functions, differ from process to process.
    described = re.sub(r" at 0x[0-9a-f]+", "", repr(model.module))
    return {
        "model": model.name,
        "weights": model.digest or digest_of_params(model.params),
        "network": hashlib.sha256(described.encode()).hexdigest()[:16],
    }


def inception_features(model: "Model") -> Features:
    """The 2048 features of FID, by the network of pytorch-fid.

    Args:
      model: from `pretrained.load`, in float32.

    Raises:
      ValueError: it is another network.
    """
    if model.network.prediction != "features":
        raise ValueError(f"{model.name} ({model.cls}) is no Inception network of FID")
    run = jax.jit(lambda params, images: model.apply(params, images=images)["pool3"])
    return functools.partial(run, model.params)


def evaluate(
    source: Source,
    features: Features,
    reference: Reference,
    grids: Mapping[str, Grid],
    calls: Iterable[int],
    solvers: Mapping[str, Callable[[], Solver]],
    num: int,
    folder: Path,
    *,
    features_name: str,
    uint8: str = "diffusers",
    seed: int = 0,
    batch: int = 64,
    denoise_to_zero: bool = False,
    plans: Mapping[str, Plan] | None = None,
    on_batch: Callable[[str, int], None] = lambda run, count: None,
) -> Iterator[Fid]:
    """The FID of every solver on every grid at every number of model calls that it can take.

    Sample k and its class depend on the seed and k alone. No more than a batch of samples is held at a time. What has
    been made is stored, so that the same call goes on where it was stopped, and adds other solvers, grids or numbers of
    calls to those that are there.

    Args:
      source: what is sampled.
      features: a function of images; FID's own are `inception_features`, a distance in others is no FID.
      reference: from `read_reference`, of the same features.
      grids: grids by name.
      calls: numbers of model calls a sample.
      solvers: solvers by name.
      num: the number of samples.
      folder: where the runs are stored; it belongs to one source and its settings.
      features_name: which features these are, for the folder's settings: a digest of their network, for example.
      uint8: how samples become bytes, see `to_uint8`.
      seed: of noise and classes.
      batch: how many samples at a time, on which figures depend by round-off only.
      denoise_to_zero: as for `plan`; the call more counts among the calls.
      plans: fitted plans by name, which follow, whatever their numbers of calls; `Fid.grid` of theirs is "fitted".
      on_batch: on_batch(run, count) is called when `count` samples more are there, of what is named by `run`.

    Yields:
      One figure a run, as soon as it is made.

    Raises:
      ValueError: `num` is less than 2, the conversion is unknown, a plan has a solver's name, the folder holds runs of
        other settings or a damaged file, or the features are not finite, or not as many as the reference's.
      OSError: a file cannot be read or written.
    """
    if num < 2:
        raise ValueError(f"a covariance needs 2 samples at least, got {num}")
    if uint8 not in UINT8:
        raise ValueError(f"uint8 conversion must be one of {', '.join(UINT8)}, got {uint8!r}")
    key = jax.random.key(seed)
    judged = {"class": source.label, "uint8": uint8, "samples": num, "seed": seed, "features": features_name}
    partitionable = bool(getattr(jax.config, "jax_threefry_partitionable", True))
    random = {"random": str(jax.random.key_impl(key)), "partitionable": partitionable}
    check_store(folder, {**source.settings, **judged, **random})

    mean, covariance = reference.mean, reference.covariance
    if mean is None or covariance is None:
        path = folder / f"reference_{reference.digest[:12]}.npz"
        stored = functools.partial(_images_of, reference.path, batch)
        mean, covariance, *_ = _gather(path, stored, features, functools.partial(on_batch, "reference"))
    figures = Figures(folder, mean, covariance)

    planned = runs(source.schedule, dict(grids), calls, dict(solvers), denoise_to_zero, plans)
    laid = [
        plan(source.schedule, r.times, solvers[r.solver](), denoise_to_zero=denoise_to_zero)
        if r.plan is None
        else r.plan
        for r in planned
    ]
    sampler = jax.jit(_sampler(source, uint8))
    for run, laid_out in zip(planned, _in_few_shapes(laid), strict=True):

        def batches(start: int, laid_out: Plan = laid_out) -> Iterator[tuple[Any, np.ndarray]]:
            for first in range(start, num, batch):
                indices = np.arange(first, first + batch, dtype=np.uint32)
                condition = None if source.conditions is None else source.conditions(indices)
                images, finite = sampler(source.params, key, indices, condition, laid_out)
                yield images, np.asarray(finite)[: num - first]

        path = path_of(folder, run.solver, run.grid, run.calls, run.digest).with_suffix(".npz")
        named = f"{run.solver}, {run.calls} calls, {run.grid}"
        made = _gather(path, batches, features, functools.partial(on_batch, named))
        if made.mean.shape != mean.shape:
            raise ValueError(
                f"{reference.path} is of {len(mean)} features, here are {len(made.mean)}: pass another reference"
            )
        value = np.inf
        if not made.blown_up:
            distance = functools.partial(frechet_distance_of_statistics, *made[:2], mean, covariance)
            value = figures.get("fid", made[:2], lambda distance=distance: [distance()])[0]
        yield Fid(run.solver, run.grid, run.calls, float(value), num, made.blown_up, run.digest)


def skipped(planned: Iterable[Run | Fid], grids: Iterable[str], calls: Iterable[int], solvers: Iterable[str]) -> list:
    """The (solver, grid, calls) that are not among the runs: the solver has no run of exactly so many calls."""
    there = {(r.solver, r.grid, r.calls) for r in planned}
    asked = [(s, g, c) for s in solvers for g in grids for c in sorted(set(calls))]
    return [run for run in asked if run not in there]


def _sampler(source: Source, uint8: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The pure function (params, key, indices, condition, plan) -> bytes (B, H, W, 3), whether each is finite."""
    run = images_from_key(source, uint8)

    def sampler(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        images, finite = run(*arguments)
        return jnp.broadcast_to(images, (*images.shape[:-1], 3)), finite

    return sampler


def _images_of(path: Path, batch: int, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The images of a reference file as batches for `_gather`, the last one filled up."""
    rows = stored_rows(path, "arr_0", batch, start)
    while True:
        try:
            images = next(rows, None)
        except DAMAGES as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if images is None:
            return
        yield np.resize(images, (batch, *images.shape[1:])), np.ones(len(images), bool)


def _in_few_shapes(plans: Sequence[Plan]) -> list[Plan]:
    """The same plans, padded so that those which can run in one compiled program do."""
    groups: dict[Any, list[int]] = {}
    for i, laid_out in enumerate(plans):
        table = laid_out.table
        width = table.predictor.shape[1:] if laid_out.rule is not None or table.predictor.ndim != 2 else None
        groups.setdefault((laid_out.rule, width, table.noise is None), []).append(i)
    shaped = list(plans)
    for members in groups.values():
        if plans[members[0]].table.predictor.ndim != 2:
            continue
        stacked = stack([plans[i] for i in members])
        for place, i in enumerate(members):
            shaped[i] = jax.tree.map(lambda leaf, place=place: np.asarray(leaf[place]), stacked)
    return shaped


def _gather(
    path: Path,
    batches: Callable[[int], Iterator[tuple[Any, np.ndarray]]],
    features: Features,
    on_batch: Callable[[int], None],
) -> _Made:
    """The statistics of the features of images, stored on the way.

    Args:
      path: the file of the run.
      batches: batches(start) -> images from number `start` on, in batches of one shape, each with booleans, for the
        images of it that count, whether they are finite.
      features: the function of images.
      on_batch: on_batch(count) is called with the number of images more.
    """
    found = _load(path)
    if isinstance(found, _Made):
        on_batch(found.samples + found.blown_up)
        return found
    tally, saved = found, time.monotonic()
    start = 0 if tally is None else tally.statistics.samples + tally.blown_up
    if start:
        on_batch(start)
    for images, finite in batches(start):
        x = np.asarray(features(images))
        if x.ndim != 2 or len(x) != len(images):
            raise ValueError(f"features of {len(images)} images must be ({len(images)}, D), got shape {x.shape}")
        tally = tally or _Tally(no_statistics(x.shape[1]), 0)
        counted = include(tally.statistics, x[: len(finite)][finite])
        tally = _Tally(counted, tally.blown_up + int(np.count_nonzero(~finite)))
        on_batch(len(finite))
        if time.monotonic() - saved >= SAVE_SECONDS:
            _save(path, tally.statistics._asdict() | {"blown_up": tally.blown_up})
            saved = time.monotonic()
    assert tally is not None
    samples, mean, scatter = tally.statistics
    made = _Made(mean, scatter / max(samples - 1, 1), samples, tally.blown_up)
    _save(path, dict(zip(_KEYS, made, strict=True)))
    return made


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _load(path: Path) -> _Made | _Tally | None:
    """What is in the file of a run, None where there is no file."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if set(_KEYS) <= set(arrays):
                mu, sigma, samples, blown_up = (arrays[key] for key in _KEYS)
                return _Made(mu, sigma, int(samples), int(blown_up))
            statistics = Statistics(int(arrays["samples"]), arrays["mean"], arrays["scatter"])
            return _Tally(statistics, int(arrays["blown_up"]))
    except DAMAGES as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the run is made anew") from error
