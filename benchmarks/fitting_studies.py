"""Prints what limits fitted plans, one table for each study.

    uv run --group quality python benchmarks/fitting_studies.py ablation --store runs/quality

Models, figures and settings are those of fitting.py: Frechet distance / median / root mean square error on noise that
no fit has seen, in 5 calls unless --calls says otherwise.

- ablation: what the times of the states, the weights, and the times told to the model give, alone and together; with 2
  to 5 outputs a step; with the mean square; from other starts, variance_optimal among them.
- samples: how many noises are enough.
- radius: whether noise that may move in training helps.
- transfer: plans of one model on the others, and a plan fitted to several exact models together, which needs no
  network.
- gaussian: plans fitted to the Gaussian that has the covariance of a model's data, which needs none either.
- guidance: plans of one scale at another.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fitting import EXACT, GRID, START, Task, fitted, judge, start_of, task_of, training_free
from quality import PROBLEMS

import evodiff_jax as ed
from evodiff_jax import fitting
from evodiff_jax.evaluation.data import load_fashion_mnist
from evodiff_jax.evaluation.metrics import trajectory_errors
from evodiff_jax.fitting import Offsets
from evodiff_jax.grids import GRIDS
from evodiff_jax.solvers import FORMS

NETWORKS = ("fashion-1", "fashion-2", "galaxies-hsc", "galaxies-ztf")
TOGETHER = ("digits-0.1", "digits-0.3", "mixture-64d")  # and a Gaussian of power-law spectrum


def row(*cells: Any) -> None:
    """Prints a row of a table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*names: str) -> None:
    """Prints the head of a table."""
    row(*names)
    row(*["---"] * len(names))


def words(figures: Sequence[float]) -> str:
    """Frechet / median / RMS."""
    return " / ".join(f"{value:.3g}" for value in figures)


def only(*names: str, steps: int) -> Any:
    """The optimizer of `fit` for some of the offsets."""
    labels = Offsets(*("on" if name in names else "off" for name in Offsets._fields))
    adam = optax.adam(optax.cosine_decay_schedule(0.03, steps))
    return optax.multi_transform({"on": adam, "off": optax.set_to_zero()}, labels)


def ablation(models: Sequence[str], calls: int, store: Path) -> None:
    """What is fitted, and from where."""
    head("model", "what is fitted", "Frechet / median / RMS")
    for name in models:
        task = task_of(name, store)
        row(name, "nothing", words(judge(task.problem, start_of(task, calls), store)))
        row(name, "training-free, the least of each", words(training_free(task.problem, [calls], store)[calls]))
        for parts in (("times",), ("weights",), ("shifts",), ("times", "weights"), ("weights", "shifts")):
            result = fitted(task, calls, "+".join(parts), optimizer=only(*parts, steps=task.settings.steps))
            row(name, " and ".join(parts), words(judge(task.problem, result.plan, store)))
        for outputs in (2, 3, 4, 5):
            label = "" if outputs == 4 else f"{outputs}-outputs"
            result = fitted(task, calls, label, outputs=outputs)
            row(name, f"all, {outputs} outputs a step", words(judge(task.problem, result.plan, store)))
        result = fitted(task, calls, "mean-square", loss="mean_square")
        row(name, "all, the loss mean_square", words(judge(task.problem, result.plan, store)))
        for solver, grid in (
            (START, "log_snr"),
            ("unipc-3", "karras"),
            ("ipndm-3", "log_snr"),
            ("ddim", "karras"),
            ("variance_optimal", "log_snr"),
        ):
            result = fitted(task, calls, solver=solver, grid=grid)
            row(name, f"all, from {solver} on {grid}", words(judge(task.problem, result.plan, store)))


def samples(models: Sequence[str], calls: int, store: Path) -> None:
    """The loss on the noises of the fit, on others, and the figures."""
    head("model", "noises for training", "median, training", "median, validation", "Frechet / median / RMS")
    for name in models:
        task = task_of(name, store)
        half = len(task.noise) // 2
        for count in (16, 32, 64, 128, 256, 1024):
            if count > half:
                continue
            # The same noises for validation and test, whatever the number for training.
            chosen = np.r_[:count, half : 2 * half]
            part = task._replace(
                noise=task.noise[chosen],
                target=task.target[chosen],
                condition=None if task.condition is None else task.condition[chosen],
            )
            share = half / 2 / len(chosen)
            result = fitted(part, calls, f"{count}-noises", validation=share, test=share)
            mine = part._replace(noise=part.noise[:count], target=part.target[:count])
            row(
                name,
                count,
                f"{np.median(errors(mine, result.plan)):.3g}",
                f"{result.report.validation_fitted.median:.3g}",
                words(judge(task.problem, result.plan, store)),
            )


def errors(task: Task, plan: ed.Plan) -> np.ndarray:
    """The errors of a plan's samples from a task's noise."""
    problem = task.problem
    count = len(task.noise)
    condition = None if task.condition is None else task.condition[:count]
    run = jax.jit(lambda x, plan: ed.sample(lambda x, t: problem.denoise(problem.params, x, t, condition), x, plan))
    x = np.asarray(run(task.noise, plan))
    return trajectory_errors(x, task.target)


def radius(models: Sequence[str], calls: int, store: Path) -> None:
    """Noise that may move in training."""
    head("model", "radius", "Frechet / median / RMS")
    for name in models:
        task = task_of(name, store)
        for size in (0.0, 0.003, 0.01, 0.03, 0.1):
            result = fitted(task, calls, f"radius-{size}" if size else "", radius=size)
            row(name, size, words(judge(task.problem, result.plan, store)))


def moved_to(task: Task, calls: int, offsets: Offsets) -> ed.Plan:
    """The plan that offsets from the same start give on the schedule of a task."""
    schedule = task.problem.schedule
    return fitting.realise(fitting.start_of(start_of(task, calls), schedule), offsets, schedule)


def together(calls: int, store: Path, *parts: str) -> Offsets:
    """Offsets, or only some of their parts, fitted to several exact models at once, all on EDM's schedule."""
    tasks = {name: task_of(name, store) for name in TOGETHER}
    schedule = ed.schedules.edm()
    spectrum = np.float32(np.arange(1, 65) ** -1.0)
    noise = {name: task.noise[:1024] for name, task in tasks.items()}
    noise["gaussian"] = np.asarray(schedule.noise(jax.random.key(5), (1024, 64)))
    models: dict[str, Callable[..., Any]] = {
        name: lambda x, t, task=task: task.problem.denoise(None, x, t, None) for name, task in tasks.items()
    }
    models["gaussian"] = gaussian(schedule, spectrum**2)
    denoise = lambda x, t: {name: models[name](x[name], t) for name in x}
    start = ed.plan(schedule, GRIDS[GRID](schedule, calls), FORMS[START].make())
    target = fitting.converge(denoise, noise, fitting.default_teacher(schedule, start))
    first = jax.jit(lambda x: ed.sample(denoise, x, start))(noise)
    apart = lambda x, y: jnp.sqrt(jnp.mean(jnp.square(x - y), axis=1) + 1e-12)
    scale = {name: float(jnp.sqrt(jnp.mean(jnp.square(first[name] - target[name])))) for name in target}

    def error(x: Any, y: Any) -> jax.Array:
        logs = [jnp.log(apart(x[name], y[name]) / scale[name] + 0.05) for name in scale]
        return jnp.exp(sum(logs) / len(logs))

    result = fitting.fit(
        denoise,
        schedule,
        start,
        noise,
        key=jax.random.key(0),
        target=target,
        error=error,
        optimizer=only(*parts, steps=EXACT.steps) if parts else None,
        steps=EXACT.steps,
        batch=EXACT.batch,
        progress=False,
    )
    return result.offsets


def gaussian(schedule: ed.NoiseSchedule, variance: Any) -> Callable[[Any, Any], Any]:
    """The exact model of independent Gaussians of mean 0."""

    def denoise(x: Any, t: Any) -> Any:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * variance / (alpha**2 * variance + sigma**2) * x

    return denoise


def transfer(models: Sequence[str], calls: int, store: Path) -> None:
    """Plans of other models, in ratios to the least training-free figures."""
    head("model", "plan of", "Frechet / median / RMS over the training-free least")
    several, some = f"{', '.join(TOGETHER)} and a Gaussian together", ("times", "weights")
    alone = only(*some, steps=EXACT.steps)
    sources = {
        **{name: fitted(task_of(name, store), calls).offsets for name in ("digits-0.1", *NETWORKS)},
        several: together(calls, store),
        "digits-0.1, times and weights": fitted(
            task_of("digits-0.1", store), calls, "+".join(some), optimizer=alone
        ).offsets,
        f"{several}, times and weights": together(calls, store, *some),
    }
    for name in models:
        task = task_of(name, store)
        free = training_free(task.problem, [calls], store)[calls]
        for source, offsets in sources.items():
            figures = judge(task.problem, moved_to(task, calls, offsets), store)
            row(name, source, words([a / b for a, b in zip(figures, free, strict=True)]))


def data_of(name: str, store: Path) -> np.ndarray:
    """(N, D) data of a model, for its covariance."""
    if name.startswith("fashion"):
        images = load_fashion_mnist("train").images[:5000]
    elif name.startswith("galaxies"):
        images = np.load(next((store / f"{name}-data").glob("converged_*.npy")))
    else:
        return np.asarray(PROBLEMS[name][1](PROBLEMS[name][0], store).data)
    return np.asarray(images, np.float64).reshape(len(images), -1)


def gaussians(models: Sequence[str], calls: int, store: Path) -> None:
    """Plans fitted to Gaussians of the data's covariance."""
    head("model", "plan", "Frechet / median / RMS")
    for name in models:
        task = task_of(name, store)
        schedule = task.problem.schedule
        data = data_of(name, store)
        variance = np.linalg.svd(data - data.mean(0), compute_uv=False) ** 2 / len(data)
        denoise = gaussian(schedule, np.float32(variance))
        x_T = schedule.noise(jax.random.key(0), (512, len(variance)))
        start = start_of(task, calls)
        result = fitting.fit(denoise, schedule, start, x_T, key=jax.random.key(1), progress=False)
        row(name, "training-free, the least of each", words(training_free(task.problem, [calls], store)[calls]))
        row(name, "fitted to the Gaussian of its data", words(judge(task.problem, result.plan, store)))
        row(name, "fitted to it", words(judge(task.problem, fitted(task, calls).plan, store)))


def guidance(models: Sequence[str], calls: int, store: Path) -> None:
    """Plans of one scale of guidance at another."""
    head("model", "plan of", "Frechet / median / RMS")
    for name in models:
        task = task_of(name, store)
        row(name, "training-free, the least of each", words(training_free(task.problem, [calls], store)[calls]))
        for other in ("fashion-1", "fashion-2"):
            row(name, other, words(judge(task.problem, fitted(task_of(other, store), calls).plan, store)))


CHEAP = ("mixture-2d", "mixture-64d", "digits-0.1")
STUDIES: dict[str, tuple[Callable[..., None], Sequence[str]]] = {
    "ablation": (ablation, CHEAP),
    "samples": (samples, CHEAP),
    "radius": (radius, (*CHEAP, "galaxies-hsc")),
    "transfer": (transfer, tuple(PROBLEMS)),
    "gaussian": (gaussians, tuple(PROBLEMS)),
    "guidance": (guidance, ("fashion-1", "fashion-2")),
}


def main() -> None:
    """Runs studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", choices=STUDIES)
    parser.add_argument("--models", nargs="+", choices=PROBLEMS, help="default: those that the study is made for")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path("runs/quality"), help="folder of samples and figures")
    args = parser.parse_args()
    for name in args.studies:
        study, models = STUDIES[name]
        print(f"\n## {name}, {args.calls} calls\n", flush=True)
        study(args.models or models, args.calls, args.store)


if __name__ == "__main__":
    main()
