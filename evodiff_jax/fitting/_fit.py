"""`fit`: gradient descent on the offsets of a plan, judged on noise that had no part in it."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.extras import require
from evodiff_jax.fitting._offsets import Offsets, Start, check_levels, realise, start_of, time_at
from evodiff_jax.numerics import is_integer
from evodiff_jax.sampling import plan as lay_out
from evodiff_jax.sampling import sample
from evodiff_jax.schedules import NoiseSchedule, check_same_schedule, made_of
from evodiff_jax.solvers import unipc
from evodiff_jax.tables import Plan
from evodiff_jax.types import batch_size, check_function, check_keys, check_state, widest

TEACHER_STEPS = 100  # of UniPC of order 3
RATE = 0.02  # of Adam at the first step; falls to 0 as a cosine
CHUNKS = 20  # times that the validation error is taken in a fit
PATIENCE = 10  # validations without a better plan after which a fit ends
# In units of the start's median error. 0.03 to 3 give the same median (within 18 %) on mixture-2d and mixture-64d in 5
# calls; root mean squares are the smaller the larger it is, by 5 % and 47 % from 0.03 to 3.
OFFSET = 1.0
_BEYOND = 5.0  # what the default teacher adds to lambda where the run ends at sigma = 0 or starts at alpha = 0
_LEAST = 8  # samples


class Figures(NamedTuple):
    """Errors of a plan's samples: for each sample the root mean square difference from its converged sample.

    Attributes:
      median: the median over samples.
      rms: the root mean square over samples.
      mean_log: the mean of log(error + the report's `loss_offset`).
    """

    median: float
    rms: float
    mean_log: float


class Report(NamedTuple):
    """What a fit did.

    Attributes:
      start: the start's errors on the test part of the noise, which had no part in the fit.
      fitted: those of the fitted plan.
      validation_start: the start's errors on the validation part, which decided between plans.
      validation_fitted: those of the fitted plan.
      samples: how many of x_T were for training, validation and test.
      steps: steps of the optimizer that were made.
      best_step: after which of them the plan was the best; 0 is the start.
      loss_offset: the offset of the logarithm, in units of the error.
      teacher_calls: model calls for the teacher's samples, each for one sample.
      forward_calls: the same without a gradient: of the start on the training part, of validation and test.
      gradient_calls: the same with one: each is evaluated and differentiated, about three evaluations' work.
      seconds: the whole time, compilation included.
      interrupted: whether Ctrl-C ended the fit.
    """

    start: Figures
    fitted: Figures
    validation_start: Figures
    validation_fitted: Figures
    samples: tuple[int, int, int]
    steps: int
    best_step: int
    loss_offset: float
    teacher_calls: int
    forward_calls: int
    gradient_calls: int
    seconds: float
    interrupted: bool


class Fitted(NamedTuple):
    """A fitted plan.

    Attributes:
      plan: a plan like any other.
      report: what the fit did.
      offsets: from the start, float64.
      card: what else is known, as `save` writes it.
    """

    plan: Plan
    report: Report
    offsets: Offsets
    card: dict[str, Any]


class _Data(NamedTuple):
    """Noise, conditions and converged samples of one part, each a pytree of arrays with one leading axis."""

    noise: Any
    condition: Any
    target: Any = None


class _Candidate(NamedTuple):
    """The plan after a step of the optimizer, and the errors of its samples on the validation part."""

    step: int
    offsets: Offsets
    plan: Plan
    errors: np.ndarray


def fit(
    denoise: Callable[..., Any],
    schedule: NoiseSchedule,
    plan: Plan,
    x_T: Any,
    *,
    key: jax.Array,
    condition: Any = None,
    teacher: Plan | None = None,
    loss: str = "log",
    error: Callable[[Any, Any], Any] | None = None,
    optimizer: Any = None,
    steps: int = 400,
    batch: int = 128,
    validation: float = 0.25,
    test: float = 0.25,
    outputs: int = 4,
    remat: bool = False,
    progress: bool | Callable[[int, float], Any] = True,
) -> Fitted:
    """Fits a plan's times and weights to a model: the samples of few calls come near those of many.

    Args:
      denoise: the data prediction as it will be used, guidance included: denoise(x, t), or denoise(x, t, condition).
      schedule: the schedule of denoise and plan.
      plan: the start, see `start_of`; its calls and ends are those of the fitted plan.
      x_T: (N, ...) noise at the plan's first time, N >= 8, or a pytree of such. By position the first are for
        training, then those for validation, then those for the test.
      key: a random key, which chooses the batches. The same key and arguments give the same plan.
      condition: None, or a pytree of arrays (N, ...), what `denoise` takes for each sample.
      teacher: the plan whose samples are aimed at; None for UniPC of order 3 in 100 equal log-SNR steps.
      loss: "log", the mean over samples of log(error + offset), offset the start's median error; or
        "mean_square", which a few samples that end in another mode decide.
      error: error(x, target) -> (B,), not negative, such as a distance of features; None for the root mean square
        difference of a sample.
      optimizer: an optax.GradientTransformation; None for Adam with a rate that falls from 0.02 to 0 as a cosine.
      steps: of the optimizer, at most: a fit ends after 10 of 20 validations without a better plan.
      batch: samples a step, fewer where the training part is smaller, and samples at a time elsewhere.
      validation: the fraction of x_T that decides between the plans of the fit, the start among them.
      test: the fraction of x_T for the report's figures.
      outputs: see `start_of`.
      remat: as for `sample`: less memory for two more evaluations of the model a call.
      progress: True for a bar in terminals, or progress(step, validation loss), called after each validation.

    Returns:
      The best plan on the validation part, with the report. Ctrl-C after the first validation returns the best so far.

    Raises:
      TypeError: when an argument is something else.
      ValueError: when the plan can't be a start, the teacher has fewer calls or other ends, schedules differ, there are
        too few samples, or the teacher's samples are not finite.
      ModuleNotFoundError: without the extra `fit`.

    Example:
      >>> import jax, evodiff_jax as ed
      >>> from evodiff_jax import fitting
      >>> schedule = ed.schedules.edm()
      >>> denoise = ed.denoisers.gaussian_mixture(schedule, [[-1.0, 0.0], [1.0, 0.5]], 0.1)
      >>> start = ed.plan(schedule, ed.grids.log_snr(schedule, 4), ed.solvers.dpm_solver_pp(2))
      >>> x_T = schedule.noise(jax.random.key(0), (128, 2))
      >>> fitted = fitting.fit(denoise, schedule, start, x_T, key=jax.random.key(1), steps=60, batch=32)
      >>> fitted.report.fitted.median < 0.7 * fitted.report.start.median
      True
    """
    require("optax", *(["tqdm"] if progress is True else []), extra="fit")
    import optax

    began = time.monotonic()
    start, teacher, x_T, parts = _checked(
        denoise, schedule, plan, x_T, condition, teacher, loss, error, steps, batch, validation, test, outputs
    )
    key = check_keys(key, 0)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps)) if optimizer is None else optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")
    batch, error = min(int(batch), parts[0]), _root_mean_square if error is None else error

    def sampled(plan: Plan, data: _Data, remat: bool = False) -> Any:
        of_batch = denoise if condition is None else made_of(lambda x, t: denoise(x, t, data.condition), denoise)
        return sample(of_batch, data.noise, plan, remat=remat)

    judge = jax.jit(lambda plan, data: error(sampled(plan, data), data.target))
    errors = lambda plan, data: _in_batches(functools.partial(judge, plan), data, batch).astype(np.float64)
    target = _in_batches(functools.partial(jax.jit(sampled), teacher), _Data(x_T, condition), batch)
    _check_finite(target)
    train, validate, unseen = _split(_Data(x_T, condition, target), parts)
    zeros = start.zeros()
    of_start = realise(start, zeros, schedule)
    offset = _offset(errors(of_start, train), target)

    def value(xp: Any, errors: Any) -> Any:
        return xp.mean(xp.log(errors + offset) if loss == "log" else errors**2)

    def objective(offsets: Offsets, data: _Data) -> Any:
        return value(jnp, error(sampled(realise(start, offsets, schedule), data, remat), data.target))

    @jax.jit
    def advance(carry: Any, first: Any, last: Any, train: _Data, key: jax.Array) -> Any:
        def step(i: Any, carry: Any) -> Any:
            offsets, state = carry
            chosen = jax.random.choice(jax.random.fold_in(key, i), parts[0], (batch,), replace=False)
            gradient = jax.grad(objective)(offsets, jax.tree.map(lambda leaf: leaf[chosen], train))
            updates, state = optimizer.update(gradient, state, offsets)
            return optax.apply_updates(offsets, updates), state

        return jax.lax.fori_loop(first, last, step, carry)

    first = best = _Candidate(0, zeros, of_start, errors(of_start, validate))
    carry = jax.tree.map(lambda leaf: jnp.asarray(leaf, widest(jax.tree.leaves(x_T))), zeros)
    carry = carry, optimizer.init(carry)
    done = validations = best_at = 0
    interrupted = False
    tell, close = _teller(progress, steps)
    try:
        for last in np.unique(np.ceil(np.linspace(0, steps, CHUNKS + 1)[1:]).astype(int)).tolist():
            carry = advance(carry, done, last, train, key)
            offsets = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), carry[0])
            done = last
            if not all(np.isfinite(leaf).all() for leaf in offsets):
                break  # and those of all later steps would be no better
            moved = realise(start, offsets, schedule)
            found = _Candidate(done, offsets, moved, errors(moved, validate))
            validations += 1
            if np.isfinite(value(np, found.errors)) and not value(np, best.errors) <= value(np, found.errors):
                best, best_at = found, validations
            tell(done, float(value(np, best.errors)))
            if validations - best_at == PATIENCE:
                break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        close()
    calls = int(plan.calls)
    report = Report(
        start=_figures(errors(of_start, unseen), offset),
        fitted=_figures(errors(best.plan, unseen), offset),
        validation_start=_figures(first.errors, offset),
        validation_fitted=_figures(best.errors, offset),
        samples=parts,
        steps=done,
        best_step=best.step,
        loss_offset=offset,
        teacher_calls=int(teacher.calls) * sum(parts),
        forward_calls=calls * (parts[0] + (1 + validations) * parts[1] + 2 * parts[2]),
        gradient_calls=calls * batch * done,
        seconds=time.monotonic() - began,
        interrupted=interrupted,
    )
    card = {"loss": loss, "teacher_calls": int(teacher.calls), "key": jax.random.key_data(key).tolist()}
    return Fitted(best.plan, report, best.offsets, card)


def default_teacher(start: Start, schedule: NoiseSchedule) -> Plan:
    """UniPC of order 3 in 100 equal log-SNR steps between the start's ends, and beyond where lambda is infinite there.

    A run to sigma = 0 or from alpha = 0 has a last or first step more, from or to 5 beyond the start's finite lambda.
    """
    times, known = start.times, np.isfinite(start.lambda_)
    inside = start.lambda_[known] if known.any() else np.zeros(1)
    ends = inside[0] - _BEYOND * (not known[0]), inside[-1] + _BEYOND * (not known[-1])
    steps = max(TEACHER_STEPS, int(start.plan.calls))
    middle = np.asarray(time_at(schedule, np.linspace(*ends, steps + 1)))
    if known[0]:
        middle = middle[1:]
    if known[-1]:
        middle = middle[:-1]
    return lay_out(schedule, np.concatenate([times[:1], middle, times[-1:]]), unipc(3))


def _checked(
    denoise: Any,
    schedule: NoiseSchedule,
    plan: Plan,
    x_T: Any,
    condition: Any,
    teacher: Plan | None,
    loss: Any,
    error: Any,
    steps: Any,
    batch: Any,
    validation: Any,
    test: Any,
    outputs: int,
) -> tuple[Start, Plan, Any, tuple[int, int, int]]:
    """The start, the teacher, the noise and the sizes of its parts."""
    check_function("denoise", denoise, "denoise(x, t) -> x_0, or denoise(x, t, condition)")
    start = start_of(plan, schedule, outputs=outputs)
    check_same_schedule(denoise, plan.levels, "the plan's")
    if loss not in ("log", "mean_square"):
        raise ValueError(f'loss must be "log" or "mean_square", got {loss!r}; give a function of samples as error')
    if error is not None:
        check_function("error", error, "error(x, target) -> (B,)")
    for name, value in (("steps", steps), ("batch", batch)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    x_T = check_state(x_T, "x_T")
    count = batch_size(x_T)
    if count < _LEAST:
        raise ValueError(f"x_T has {count} samples, a fit needs at least {_LEAST}, and some hundreds to be of use")
    validating, testing = (max(1, round(part * count)) for part in (validation, test))
    training = count - validating - testing
    if not (0 < validation < 1 and 0 < test < 1 and training > 0):
        raise ValueError(
            "validation and test must be fractions above 0 that leave samples for training, got "
            f"validation={validation}, test={test} of {count} samples"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(condition):
        if np.shape(leaf)[:1] != (count,):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"condition{where} must have one entry for each of the {count} samples of x_T, got shape "
                f"{np.shape(leaf)}"
            )
    teacher = default_teacher(start, schedule) if teacher is None else teacher
    _check_teacher(teacher, start, schedule)
    return start, teacher, x_T, (training, validating, testing)


def _check_teacher(teacher: Any, start: Start, schedule: NoiseSchedule) -> None:
    if not isinstance(teacher, Plan):
        raise TypeError(f"teacher must be a Plan, from evodiff_jax.plan(schedule, times, solver), got {teacher!r}")
    if np.ndim(teacher.calls) != 0:
        raise ValueError(f"the teacher is a stack of {np.shape(teacher.calls)[0]} plans: give one")
    check_levels("the teacher", teacher.levels, schedule)
    if teacher.table.noise is not None:
        raise ValueError("the teacher is of a stochastic solver: its samples are not functions of x_T")
    if int(teacher.calls) < int(start.plan.calls):
        raise ValueError(f"the teacher makes {int(teacher.calls)} calls, fewer than the plan's {int(start.plan.calls)}")
    ends = float(teacher.table.time[0]), float(teacher.end)
    if not np.allclose(ends, start.times[[0, -1]], rtol=0, atol=1e-6 * (schedule.t_max - schedule.t_min)):
        raise ValueError(
            f"the teacher runs from t = {ends[0]:g} to {ends[1]:g}, the plan from {start.times[0]:g} to "
            f"{start.times[-1]:g}: give both the same ends"
        )


def _root_mean_square(x: Any, target: Any) -> Any:
    """The root mean square difference of each sample from its target, with a finite derivative where that is 0."""
    pairs = list(zip(jax.tree.leaves(x), jax.tree.leaves(target), strict=True))
    wide = widest([leaf for leaf, _ in pairs])
    squares = [jnp.sum((a.astype(wide) - b.astype(wide)).reshape(len(a), -1) ** 2, axis=1) for a, b in pairs]
    numbers = sum(a[0].size for a, _ in pairs)
    return jnp.sqrt(sum(squares) / numbers + jnp.finfo(wide).tiny)


def _in_batches(run: Callable[[Any], Any], data: _Data, batch: int) -> Any:
    """What a function of a batch makes of all samples, on the host; the last batch is filled up with the first ones."""
    count = batch_size(data.noise)
    batches = np.resize(np.arange(count), (-(-count // batch), min(batch, count)))
    made = [jax.tree.map(np.asarray, run(jax.tree.map(lambda leaf: leaf[rows], data))) for rows in batches]  # noqa: B023
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *made)


def _split(data: _Data, parts: tuple[int, int, int]) -> list[_Data]:
    """The training, validation and test parts, on the device."""
    ends = np.cumsum(parts)
    part = lambda first, last: jax.tree.map(lambda leaf: jnp.asarray(leaf[first:last]), data)
    return [part(last - count, last) for count, last in zip(parts, ends, strict=True)]


def _check_finite(samples: Any) -> None:
    finite = [np.isfinite(leaf).reshape(len(leaf), -1).all(1) for leaf in jax.tree.leaves(samples)]
    bad = np.flatnonzero(~np.logical_and.reduce(finite))
    if bad.size:
        which = ", ".join(map(str, bad[:5])) + (", ..." if bad.size > 5 else "")
        raise ValueError(
            f"{bad.size} of the teacher's {len(finite[0])} samples are not finite, those of x_T[{which}]: the model or "
            "the teacher is unusable there"
        )


def _offset(errors: np.ndarray, target: Any) -> float:
    """The offset of the logarithm, from the start's errors; above round-off of the samples."""
    if not np.isfinite(errors).any():
        raise ValueError("no error of the start's samples is finite: the start is unusable, take another solver")
    size = max(float(np.sqrt(np.mean(np.square(leaf, dtype=np.float64)))) for leaf in jax.tree.leaves(target))
    return max(OFFSET * float(np.median(errors[np.isfinite(errors)])), 1e-6 * size, float(np.finfo(np.float32).tiny))


def _figures(errors: np.ndarray, offset: float) -> Figures:
    return Figures(
        median=float(np.median(errors)),
        rms=float(np.sqrt(np.mean(errors**2))),
        mean_log=float(np.mean(np.log(errors + offset))),
    )


def _teller(progress: Any, steps: int) -> tuple[Callable[[int, float], Any], Callable[[], Any]]:
    """What is called after each validation, and at the end."""
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return lambda step, value: None, lambda: None
    from tqdm import tqdm

    bar = tqdm(total=steps, desc="fit", unit="step", disable=None)

    def tell(step: int, value: float) -> None:
        bar.set_postfix(validation=f"{value:.4g}", refresh=False)
        bar.update(step - bar.n)

    return tell, bar.close
