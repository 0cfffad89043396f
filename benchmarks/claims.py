"""Prints how the claims of EVODiff's paper (arXiv 2509.26096) come out on exact models and on a network.

    uv run python benchmarks/claims.py
    uv run python benchmarks/claims.py --models --checkpoint FILE

1. Denoising lowers the conditional entropy of the reverse transitions: the entropy of the transition and the posterior
   variance of the data along the converged trajectory, in 20 steps.
2. The data prediction does better than the noise prediction: the same method on either, with the same number of model
   calls. DPM-Solver++ and DPM-Solver are the same polynomials of the data and of the noise prediction; so are UniPC's
   two, and SA-Solver's predictor without noise and DEIS on log kappa.
3. Optimised conditional variance lowers errors without a reference: `evodiff()` against the fixed coefficients of
   UniPC-2, which reads the same three outputs, and of DPM-Solver++(2M), which reads the two that its predictor reads;
   `variance_optimal()` against UniPC-3, which reads the same four.

Then, for the diagnostic `call_density`: the errors on times that follow it over those on the log-SNR grid.

Exact models are normal data of 64 standard deviations from 0.02 to 1, and two mixtures; the network is the packaged one
without guidance, or a checkpoint. Errors are root mean square distances from the converged samples of the same noise
(UniPC-3 in 200 steps), on EDM's schedule and the log-SNR grid. A ratio is of the root mean squares, and of the medians,
over samples; its interval is of 95 %, bootstrapped over samples, from the same rows of both.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax import diagnostics
from evodiff_jax.evaluation import modes_of
from evodiff_jax.evaluation.metrics import Estimate, bootstrap, bootstrap_ratio, trajectory_errors
from evodiff_jax.schedules import NoiseSchedule, of_schedule
from evodiff_jax.tables import Solver

CALLS = (5, 6, 8, 10, 15, 20)
MODELS = ("normal-64d", "mixture-2d", "mixture-64d")
PARTS = ("entropies", "errors", "updates", "times")
EXACT_SAMPLES, IMAGES = 1000, 32
TRAJECTORY_STEPS = 20
UPDATES = 8  # calls in which variances and errors of updates are compared
PARAMETERISATIONS: dict[str, tuple[Solver, Solver]] = {
    "DPM-Solver++ / DPM-Solver, order 1": (ed.solvers.dpm_solver_pp(1), ed.solvers.dpm_solver(1)),
    "DPM-Solver++ / DPM-Solver, order 2": (ed.solvers.dpm_solver_pp(2), ed.solvers.dpm_solver(2)),
    "DPM-Solver++ / DPM-Solver, order 3": (ed.solvers.dpm_solver_pp(3), ed.solvers.dpm_solver(3)),
    "Adams on log kappa, 2 outputs": (
        ed.solvers.sa_solver(2, 0, 0.0),
        ed.solvers.deis(1, "log-rho-AB", lower_order_final=True),
    ),
    "Adams on log kappa, 3 outputs": (
        ed.solvers.sa_solver(3, 0, 0.0),
        ed.solvers.deis(2, "log-rho-AB", lower_order_final=True),
    ),
    "UniPC, order 2": (ed.solvers.unipc(2), ed.solvers.unipc(2, prediction="epsilon")),
    "UniPC, order 3": (ed.solvers.unipc(3), ed.solvers.unipc(3, prediction="epsilon")),
}
RULES: dict[str, tuple[Solver, Solver]] = {
    "evodiff / UniPC-2": (ed.solvers.evodiff(), ed.solvers.unipc(2)),
    "evodiff / DPM-Solver++(2M)": (ed.solvers.evodiff(), ed.solvers.dpm_solver_pp(2)),
    "variance_optimal / UniPC-3": (ed.solvers.variance_optimal(), ed.solvers.unipc(3)),
}


SOLVERS: dict[str, Solver] = {
    "DDIM": ed.solvers.ddim(),
    "DPM-Solver, order 2": ed.solvers.dpm_solver(2),
    "DPM-Solver++, order 2": ed.solvers.dpm_solver_pp(2),
    "DPM-Solver, order 3": ed.solvers.dpm_solver(3),
    "DPM-Solver++, order 3": ed.solvers.dpm_solver_pp(3),
    "UniPC-2 of the noise": ed.solvers.unipc(2, prediction="epsilon"),
    "UniPC-2": ed.solvers.unipc(2),
    "UniPC-3": ed.solvers.unipc(3),
    "evodiff": ed.solvers.evodiff(),
    "variance_optimal": ed.solvers.variance_optimal(),
}


class Model(NamedTuple):
    """A model with the noise that its runs start from; denoise(params, x, t, labels)."""

    name: str
    denoise: Callable[..., Any]
    params: Any
    labels: Any
    schedule: NoiseSchedule
    noise: jax.Array
    batch: int


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS, help="exact models")
    parser.add_argument("--checkpoint", default="fashion_mnist", help="name or file of the network; none for none")
    parser.add_argument("--images", type=int, default=IMAGES, help="samples of the network")
    parser.add_argument("--batch", type=int, default=IMAGES, help="of them at a time")
    parser.add_argument("--calls", nargs="+", type=int, default=CALLS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    models = [exact(name, args.seed) for name in args.models]
    if args.checkpoint != "none":
        models.append(network(args.checkpoint, args.images, args.batch, args.seed))
    for model in models:
        print(f"\n### {model.name}, {len(model.noise)} samples\n", flush=True)
        calls = sorted(set(args.calls))
        if "entropies" in args.parts:
            entropies(model)
        if "errors" in args.parts:
            errors = errors_of(model, calls)
            for title, pairs in (("data / noise prediction", PARAMETERISATIONS), ("rule / fixed coefficients", RULES)):
                ratios(title, pairs, errors)
        if "updates" in args.parts:
            updates(model)
        if "times" in args.parts:
            times_by_density(model, calls)


def exact(name: str, seed: int) -> Model:
    """A model without error."""
    schedule = ed.schedules.edm()
    if name == "normal-64d":
        scales = np.geomspace(0.02, 1.0, 64)

        def denoise(x: jax.Array, t: Any) -> jax.Array:
            square = jnp.asarray(scales**2, x.dtype)
            return square / (square + jnp.asarray(t, x.dtype) ** 2) * x

        denoise, shape = of_schedule(denoise, schedule), (64,)
    else:
        centers, std = modes_of(name)
        denoise, shape = ed.denoisers.gaussian_mixture(schedule, centers, std), centers.shape[1:]
    x_T = schedule.noise(jax.random.key(seed), (EXACT_SAMPLES, *shape))
    return Model(name, lambda _, x, t, __: denoise(x, t), None, np.zeros(EXACT_SAMPLES), schedule, x_T, EXACT_SAMPLES)


def network(path: str, images: int, batch: int, seed: int) -> Model:
    """A network without guidance, with the classes in turn where it has some."""
    from evodiff_jax import pretrained

    model = pretrained.load(path)
    labels = np.arange(images, dtype=np.int32) % max(model.num_classes, 1)

    def denoise(params: Any, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
        return model.denoiser(params, labels if model.num_classes else None)(x, t)

    x_T = model.schedule.noise(jax.random.key(seed), (images, *model.image_shape))
    return Model(model.name, denoise, model.params, labels, model.schedule, x_T, min(batch, images))


def in_batches(model: Model, run: Callable[..., Any]) -> Any:
    """run(params, x_T, labels) of each batch, on the host."""
    made = []
    for start in range(0, len(model.noise), model.batch):
        rows = slice(start, start + model.batch)
        made.append(jax.tree.map(np.asarray, run(model.params, model.noise[rows], model.labels[rows])))
    return made


def entropies(model: Model) -> None:
    """Prints in how many steps of the converged trajectory entropy and variance fall, over samples and steps."""
    schedule, times = model.schedule, ed.grids.log_snr(model.schedule, TRAJECTORY_STEPS)
    small = model.noise[0].size <= 64

    @jax.jit
    def run(params: Any, x_T: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        denoise = lambda x, t: model.denoise(params, x, t, labels)
        path = diagnostics.converge(denoise, x_T, schedule, times, substeps=10)

        def step(scanned: Any) -> tuple[jax.Array, jax.Array]:
            x, t, after = scanned
            if small:
                covariance = diagnostics.posterior_covariance(denoise, schedule, x, t)
                entropy = diagnostics.transition_entropy_of_covariance(schedule, t, after, covariance)
                return jnp.trace(covariance, axis1=1, axis2=2) / x[0].size, entropy
            # The same probes at all times: their common error cancels in differences.
            key = jax.random.key(1)
            variance = diagnostics.posterior_variance(denoise, schedule, x, t, key=key, probes=8).value
            return variance, diagnostics.transition_entropy(schedule, t, after, variance)

        scanned = (path.states[:-1], path.times[:-1], path.times[1:])
        return jax.lax.map(step, scanned)

    variance, entropy = (np.concatenate(parts, 1) for parts in zip(*in_batches(model, run), strict=True))
    how = "the exact Jacobian" if small else "8 probes"
    print(f"Along the converged trajectory, {TRAJECTORY_STEPS} steps, by {how}:\n")
    print("| quantity | falls in so many of all steps and samples | samples in which it falls in every step |")
    print("| --- | ---: | ---: |")
    for name, values in (("entropy of the reverse transition", entropy), ("posterior variance of the data", variance)):
        falls = np.diff(values, axis=0) < 0
        share = lambda rows, falls=falls: float(falls[:, rows].mean())
        every = lambda rows, falls=falls: float(falls[:, rows].all(0).mean())
        cells = (cell(bootstrap(of, falls.shape[1]), 3) for of in (share, every))
        print(f"| {name} | {' | '.join(cells)} |")
    print(flush=True)


def errors_of(model: Model, calls: list[int]) -> dict[tuple[Solver, int], np.ndarray]:
    """The trajectory error of every sample, by solver and number of calls."""
    pairs = [*PARAMETERISATIONS.values(), *RULES.values()]
    solvers = dict.fromkeys(solver for pair in pairs for solver in pair)

    @jax.jit
    def run(params: Any, x_T: jax.Array, labels: jax.Array, plan: ed.Plan) -> jax.Array:
        return ed.sample(lambda x, t: model.denoise(params, x, t, labels), x_T, plan)

    def samples(solver: Solver, steps: int, rows: int) -> np.ndarray:
        plan = ed.plan(model.schedule, ed.grids.log_snr(model.schedule, steps), solver, max_calls=rows)
        made = in_batches(model, lambda params, x, labels: run(params, x, labels, plan))
        x = np.concatenate(made)
        if not np.isfinite(x).all():
            raise SystemExit(f"{solver.name} in {steps} calls gives samples that are not finite on {model.name}")
        return x

    converged = samples(ed.solvers.unipc(3), 200, 200)
    return {
        (solver, count): trajectory_errors(samples(solver, count, max(calls)), converged)
        for solver in solvers
        for count in calls
    }


def ratios(title: str, pairs: dict[str, tuple[Solver, Solver]], errors: dict[tuple[Solver, int], np.ndarray]) -> None:
    """Prints the ratios of root mean squares and medians of each pair."""
    calls = sorted({count for _, count in errors})
    rms = lambda values: float(np.sqrt(np.mean(np.square(values))))
    for statistic, of in (("root mean square", rms), ("median", lambda values: float(np.median(values)))):
        print(f"{title}, ratio of {statistic} errors:\n")
        print("| method | " + " | ".join(f"{count} calls" for count in calls) + " |")
        print("| --- |" + " ---: |" * len(calls))
        for name, (over, under) in pairs.items():
            cells = []
            for count in calls:
                a, b = errors[over, count], errors[under, count]
                found = bootstrap_ratio(lambda rows: of(a[rows]), lambda rows: of(b[rows]), len(a), resamples=400)  # noqa: B023
                cells.append(cell(found, 2))
            print(f"| {name} | {' | '.join(cells)} |")
        print(flush=True)


def updates(model: Model) -> None:
    """Prints how large the conditional variances of updates are, and the errors of the steps alone."""
    schedule, times = model.schedule, ed.grids.log_snr(model.schedule, UPDATES)
    alpha, _, lambda_ = schedule.levels(times)
    of_ddim = np.square(alpha[1:] * np.expm1(lambda_[:-1] - lambda_[1:]))
    reference_of = jax.jit(
        lambda params, x, labels: diagnostics.converge(
            lambda x, t: model.denoise(params, x, t, labels), x, schedule, times
        )
    )
    references = in_batches(model, reference_of)
    print(
        f"In {UPDATES} calls: the conditional variance of an update over that of DDIM's, geometric mean over steps and"
    )
    print("samples; the error of a step alone, root mean square over steps and samples.\n")
    print("| solver | conditional variance of the update | error of the step alone |")
    print("| --- | ---: | ---: |")
    for name, solver in SOLVERS.items():
        plan = ed.plan(schedule, times, solver)

        @jax.jit
        def run(
            params: Any, x: jax.Array, labels: jax.Array, reference: Any, plan: ed.Plan = plan
        ) -> tuple[jax.Array, jax.Array]:
            denoise = lambda x, t: model.denoise(params, x, t, labels)
            gains = diagnostics.follow(denoise, x, plan).gains
            return gains, diagnostics.transition_errors(denoise, plan, reference)

        parts = iter(references)
        made = in_batches(model, lambda params, x, labels: run(params, x, labels, next(parts)))  # noqa: B023
        gains, alone = (np.concatenate(of_parts, 1) for of_parts in zip(*made, strict=True))
        logs = np.log(gains / of_ddim[:, None]).mean(0)
        squares = np.square(alone).mean(0)
        variance = bootstrap(lambda rows: float(np.exp(logs[rows].mean())), len(logs))  # noqa: B023
        error = bootstrap(lambda rows: float(np.sqrt(squares[rows].mean())), len(logs))  # noqa: B023
        print(f"| {name} | {cell(variance, 2)} | {cell(error, 4)} |")
    print(flush=True)


def times_by_density(model: Model, calls: list[int]) -> None:
    """Prints what times that follow `call_density` are worth; the density is of 40 times and of other noise."""
    schedule, fine = model.schedule, ed.grids.log_snr(model.schedule, 40)
    rows = slice(min(len(model.noise), model.batch, 200))
    other = schedule.noise(jax.random.key(12345), model.noise[rows].shape)
    path = jax.jit(
        lambda params, x, labels: diagnostics.converge(
            lambda x, t: model.denoise(params, x, t, labels), x, schedule, fine, substeps=4
        )
    )(model.params, other, model.labels[rows])

    @jax.jit
    def run(params: Any, x_T: jax.Array, labels: jax.Array, plan: ed.Plan) -> jax.Array:
        return ed.sample(lambda x, t: model.denoise(params, x, t, labels), x_T, plan)

    def samples(plan: ed.Plan) -> np.ndarray:
        return np.concatenate(in_batches(model, lambda params, x, labels: run(params, x, labels, plan)))

    converged = samples(ed.plan(schedule, ed.grids.log_snr(schedule, 200), ed.solvers.unipc(3)))
    rms = lambda values: float(np.sqrt(np.mean(np.square(values))))
    print("Times that follow `call_density` / log-SNR grid, ratio of root mean square errors:\n")
    print("| solver | order | " + " | ".join(f"{count} calls" for count in calls) + " |")
    print("| --- | ---: |" + " ---: |" * len(calls))
    for name, order in (("DDIM", 1), ("DPM-Solver++, order 2", 2), ("UniPC-2", 2), ("UniPC-3", 3)):
        density, cells = diagnostics.call_density(path, schedule, order), []
        for count in calls:
            followed = diagnostics.times_by_density(schedule, density, fine[0], fine[-1], count)
            plans = [
                ed.plan(schedule, times, SOLVERS[name], max_calls=max(calls))
                for times in (followed, ed.grids.log_snr(schedule, count))
            ]
            a, b = (trajectory_errors(samples(plan), converged) for plan in plans)
            found = bootstrap_ratio(lambda rows: rms(a[rows]), lambda rows: rms(b[rows]), len(a), resamples=400)  # noqa: B023
            cells.append(cell(found, 2))
        print(f"| {name} | {order} | {' | '.join(cells)} |", flush=True)
    print(flush=True)


def cell(found: Estimate, digits: int) -> str:
    """An estimate with its interval."""
    return f"{found.value:.{digits}f} ({found.low:.{digits}f}, {found.high:.{digits}f})"


if __name__ == "__main__":
    main()
