"""All diagnostics of several solvers on one model, in batches."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.diagnostics._errors import reconstruction_errors, state_errors, transition_errors, update_variance
from evodiff_jax.diagnostics._finite import check_flags, finite_flags
from evodiff_jax.diagnostics._geometry import Density, curvature, density_of, squared_derivatives
from evodiff_jax.diagnostics._posterior import posterior_variance
from evodiff_jax.diagnostics._runs import Run, Trajectory, converge, follow, refined
from evodiff_jax.diagnostics._states import check_count
from evodiff_jax.diagnostics._transitions import transition_entropy, transition_information, transition_variance
from evodiff_jax.sampling import check_times, plan
from evodiff_jax.schedules import NoiseSchedule, expect_schedule, made_of
from evodiff_jax.tables import Plan, Solver
from evodiff_jax.types import Denoiser, State, batch_size, check_function, check_keys, check_state, fold_in

QUANTITIES = {
    "posterior_variance": "variance of the data given the state",
    "transition_variance": "variance of the reverse transition",
    "update_variance": "conditional variance of the update",
    "entropy": "conditional entropy of the transition, nats a coordinate",
    "information": "information about the data, nats a coordinate",
    "transition_error": "error of the step alone",
    "state_error": "error of the state after the step",
    "reconstruction_error": "error of the data prediction",
    "curvature": "curvature of the converged trajectory",
}
"""What a diagnosis holds of every step, in words; a solver's rule adds what it tells, such as zeta and eta."""
_ORDERS = (1, 2)
_NODES = 30  # times of the converged trajectory, at least, that the density of calls is made of


class Diagnosis(NamedTuple):
    """What a solver did on a model.

    Attributes:
      times: (N + 1,) float64, of the steps.
      lambda_: (N + 1,), half the log-SNR there.
      values: by name, (N, B) of every step and sample: those of QUANTITIES, at the start of the step except
        `state_error`, and what the solver's rule told. NaN where there is no such number.
      density: where calls help, as `call_density` has it, for methods of order 1 and 2; of the model, the same for all
        solvers. An order is left out where the trajectory has too few times, or the data prediction does not change.
    """

    times: np.ndarray
    lambda_: np.ndarray
    values: dict[str, np.ndarray]
    density: dict[int, Density]


def diagnose(
    denoise: Callable[..., Any],
    x_T: State,
    schedule: NoiseSchedule,
    times: Any,
    solvers: Mapping[str, Solver],
    *,
    key: jax.Array,
    params: Any = None,
    condition: Any = None,
    x_0: State | None = None,
    probes: int = 8,
    substeps: int = 20,
    batch: int | None = None,
) -> dict[str, Diagnosis]:
    """Runs solvers from the same noise on the same times, and measures every step; on the host.

    A solver takes 2 + probes times the calls of its run, with JVPs counted as one call each, and the converged
    trajectory substeps calls a step.

    Args:
      denoise: denoise([params,] x, t [, condition]) -> x_0, the data prediction; params and condition are passed where
        they are given.
      x_T: (B, ...), the noise at times[0], or a pytree of such.
      schedule: the model's noise schedule.
      times: (N + 1,) concrete times, as for `plan`.
      solvers: deterministic solvers by name.
      key: a random key, of the probes.
      params: the weights, a pytree; given, they are no constants of the compiled programs.
      condition: a pytree of arrays (B, ...).
      x_0: the data, like x_T, where they are known; else reconstruction is judged by the converged sample.
      probes: as for `posterior_variance`.
      substeps: as for `converge`.
      batch: samples at a time, by default all; memory grows with it, as 3 N states, the states and data predictions
        at 30 times or more of the converged trajectory, and one JVP.

    Returns:
      A diagnosis for each solver. `transition_error` and `update_variance` are NaN for solvers of several calls a step.

    Raises:
      TypeError: when an argument is of another type.
      ValueError: when an argument is out of range, a solver is stochastic, or an output or a state is not finite; the
        message says of which solver, and from which call and time on.
    """
    check_function("denoise", denoise, "denoise(x, t) -> x_0")
    expect_schedule(schedule)
    x_T, key = check_state(x_T, "x_T"), check_keys(key, 1)
    count = batch_size(x_T)
    times = np.asarray(check_times(times, schedule))
    probes, batch = check_count("probes", probes, 2), check_count("batch", count if batch is None else batch, 1)
    if not isinstance(solvers, Mapping) or not solvers:
        raise TypeError(f"solvers must be a dictionary of solvers by name, with one at least, got {solvers!r}")
    plans = {name: plan(schedule, times, solver) for name, solver in solvers.items()}
    for name, laid_out in plans.items():
        if laid_out.table.noise is not None:
            raise ValueError(f"{name} is stochastic: its states have no trajectory of the ODE to be compared with")

    def bind(params: Any, condition: Any) -> Denoiser:
        before, after = (() if extra is None else (extra,) for extra in (params, condition))
        return made_of(lambda x, t: denoise(*before, x, t, *after), denoise)

    pieces = _pieces(len(times) - 1, check_count("substeps", substeps, 1))
    fine = refined(schedule, times, pieces)
    of_outputs = schedule.levels(fine[:-1]).lambda_
    orders = [order for order in _ORDERS if np.isfinite(of_outputs).sum() >= order + 2]

    @jax.jit
    def reference_of(params: Any, condition: Any, x: State) -> tuple[Trajectory, Any, jax.Array, dict[int, jax.Array]]:
        whole = converge(bind(params, condition), x, schedule, fine, substeps=substeps // pieces)
        found = jax.tree.map(lambda leaf: leaf[::pieces], whole)
        squares = {order: squared_derivatives(of_outputs, whole.outputs, order) for order in orders}
        return found, finite_flags(whole), curvature(found, schedule), squares

    def measure(name: str, rows: np.ndarray) -> Callable[..., Any]:
        return jax.jit(
            lambda params, condition, x, x_0, key, reference: _measured(
                bind(params, condition), x, x_0, key, reference, schedule, plans[name], rows, times, probes
            )
        )

    measures = {name: measure(name, _rows_of_steps(laid_out, times)) for name, laid_out in plans.items()}
    parts: dict[str, list[Any]] = {name: [] for name in plans}
    changes: list[dict[int, np.ndarray]] = []
    # The last batch is filled up with the first samples, so that all have one shape.
    batches = np.resize(np.arange(count), (-(-count // batch), min(batch, count)))
    for index, rows in enumerate(batches):
        x, of_batch, known = jax.tree.map(lambda leaf: leaf[rows], (x_T, condition, x_0))  # noqa: B023
        reference, flags, curved, squares = reference_of(params, of_batch, x)
        _check("the converged trajectory", fine, flags, schedule, "step")
        changes.append(jax.tree.map(np.asarray, squares))
        target = jax.tree.map(lambda leaf: leaf[-1], reference.states) if known is None else known
        for name, of_solver in measures.items():
            run_times, flags, values = of_solver(params, of_batch, x, target, fold_in(key, index), reference)
            _check(name, run_times, flags, schedule, "call")
            parts[name].append({**jax.tree.map(np.asarray, values), "curvature": np.asarray(curved)})
    lambda_ = schedule.levels(times).lambda_
    join = lambda of_batches: jax.tree.map(lambda *leaves: np.concatenate(leaves, 1)[:, :count], *of_batches)
    density = {order: density_of(of_outputs, squares, order) for order, squares in join(changes).items()}
    density = {order: found for order, found in density.items() if np.any(found.density)}
    return {name: Diagnosis(times, lambda_, join(parts[name]), density) for name in plans}


def _pieces(steps: int, substeps: int) -> int:
    """Into how many each step is divided at least, so that the times are many; substeps is a multiple of it."""
    divisors = [number for number in range(1, substeps + 1) if substeps % number == 0]
    return next((number for number in divisors if number * steps >= _NODES), substeps)


def _measured(
    denoise: Denoiser,
    x_T: State,
    x_0: State,
    key: jax.Array,
    reference: Trajectory,
    schedule: NoiseSchedule,
    laid_out: Plan,
    rows: np.ndarray,
    times: np.ndarray,
    probes: int,
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
    """The run's times, what of it is finite, and the values of one batch."""
    run = follow(denoise, x_T, laid_out)
    dtype = run.times.dtype
    states = jax.tree.map(lambda leaf: leaf[rows], run.states)
    start, end = (jnp.asarray(part, dtype) for part in (times[:-1], times[1:]))

    def variance_of(scanned: Any) -> jax.Array:
        x, t, index = scanned
        return posterior_variance(denoise, schedule, x, t, key=fold_in(key, index), probes=probes).value

    variance = jax.lax.map(variance_of, (states, start, jnp.arange(len(rows))))
    of_transition = lambda function: jax.vmap(lambda t, s, v: function(schedule, t, s, v))(start, end, variance)
    whole = len(laid_out.table.time) == len(rows)
    unknown = jnp.full(variance.shape, jnp.nan, dtype)
    values = {
        "posterior_variance": variance,
        "transition_variance": of_transition(transition_variance),
        "update_variance": update_variance(run, variance) if whole else unknown,
        "entropy": of_transition(transition_entropy),
        "information": of_transition(transition_information),
        "transition_error": transition_errors(denoise, laid_out, reference) if whole else unknown,
        "state_error": state_errors(run, reference)[1:],
        "reconstruction_error": reconstruction_errors(run, x_0)[rows],
        **_told(run, laid_out, rows),
    }
    return run.times, finite_flags(run), values


def _told(run: Run, laid_out: Plan, rows: np.ndarray) -> dict[str, jax.Array]:
    """What the rule told by name, means over channels; NaN where the rule corrected nothing."""
    if not isinstance(run.rule, dict):
        return {}
    corrects = np.asarray(laid_out.table.corrects)[rows] != 0
    means = {
        name: jnp.mean(told.reshape(*told.shape[:2], -1), 2)[rows]
        for name, told in run.rule.items()
        if hasattr(told, "ndim") and told.ndim >= 2
    }
    return {name: jnp.where(corrects[:, None], told, jnp.nan) for name, told in means.items()}


def _rows_of_steps(laid_out: Plan, times: np.ndarray) -> np.ndarray:
    """The row with which each step begins: the last one at its time."""
    of_rows = np.asarray(laid_out.table.time, np.float64)
    tolerance = 1e-6 * (times[0] - times[-1])
    return np.array([np.flatnonzero(np.abs(of_rows - t) <= tolerance)[-1] for t in times[:-1]])


def _check(name: str, times: Any, flags: Any, schedule: NoiseSchedule, row: str) -> None:
    try:
        check_flags(np.asarray(times), flags, schedule, row)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
