"""Prints what each difference between evodiff() and the released algorithm does to the error of a run.

    uv run python benchmarks/differences.py

Root mean square error against the converged probability-flow ODE on exact models (Gaussian mixtures, whose posterior
mean is known), for evodiff(), for evodiff() with one of its differences put back as released, and for
evodiff_reference(), which has them all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evodiff_jax as ed
from evodiff_jax.solvers import _evodiff
from evodiff_jax.tables import Table

STEPS = (5, 6, 8, 10, 15, 20, 25, 40)
SAMPLES = 64
CONVERGED_STEPS = 4000
DIFFERENCES = {
    "evodiff": (),
    "  released last step": ("last",),
    "  released balance factor": ("balance",),
    "  released weight and scale": ("weight", "gain"),
    "  released zeta above 20 steps": ("zeta",),
    "  released probe": ("probe",),
    "  released first step": ("first",),
    "evodiff_reference": ("last", "balance", "weight", "gain", "zeta", "probe", "first"),
}


def with_released(parts: tuple[str, ...]) -> ed.Solver:
    """evodiff() with some parts of its table taken from the released one."""

    def table(schedule: ed.NoiseSchedule, times: Any) -> Table:
        mine, released = (_evodiff._table(schedule, times, released=r) for r in (False, True))
        if "last" in parts:
            mine = mine._replace(transition=released.transition, predictor=released.predictor)
        if "first" in parts:
            mine = mine._replace(corrector=released.corrector)
        columns = [part for part in parts if part in _evodiff.Step._fields]
        steps = [
            own._replace(**{name: getattr(other, name) for name in columns})
            for own, other in zip(mine.rule, released.rule, strict=True)
        ]
        return mine._replace(rule=_evodiff.Steps(*steps))

    rule = functools.partial(_evodiff._rule, released_probe="probe" in parts, released_zeta="zeta" in parts)
    return ed.Solver("variant", table, rule, channel_axis=-1)


def main() -> None:
    """Prints a table for each problem and grid."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    problems = {
        "32 modes of deviation 0.1, 8x8x1": (0.6 * rng.normal(size=(32, 8, 8, 1)), 0.1),
        "8 modes of deviation 0.4, 4x4x3": (0.5 * rng.normal(size=(8, 4, 4, 3)), 0.4),
    }
    schedules = {
        "edm 80 to 0.002": ed.schedules.edm(),
        "edm 10 to 0.1": ed.schedules.edm(0.1, 10.0),
        "vp_linear": ed.schedules.vp_linear(),
    }
    for problem, (centers, std) in problems.items():
        for name, schedule in schedules.items():
            denoise = ed.denoisers.gaussian_mixture(centers, std, schedule)
            noise = jnp.asarray(rng.normal(size=(SAMPLES, *centers.shape[1:])))
            x_T = noise * schedule.sigma(schedule.t_max)

            def run(times: np.ndarray, solver: ed.Solver) -> jax.Array:
                return jax.jit(lambda x: ed.sample(denoise, x, times, schedule, solver))(x_T)  # noqa: B023

            # DDIM is of first order: extrapolating it takes the error to second.
            halves = [
                run(ed.grids.log_snr(schedule, n), ed.solvers.ddim()) for n in (CONVERGED_STEPS // 2, CONVERGED_STEPS)
            ]
            converged = 2 * halves[1] - halves[0]
            for grid in (ed.grids.log_snr, ed.grids.karras):
                print(f"\n{problem}; {name}; {grid.__name__}")
                print(f"{'calls':32s}" + "".join(f"{n:>8d}" for n in STEPS))
                for label, parts in DIFFERENCES.items():
                    samples = (run(grid(schedule, n), with_released(parts)) for n in STEPS)
                    errors = [float(jnp.sqrt(jnp.mean((x - converged) ** 2))) for x in samples]
                    print(f"{label:32s}" + "".join(f"{e:8.4f}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
