"""`fit`: gradient descent on the offsets of a plan, judged on noise that had no part in it."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax.extras import require
from evodiff_jax.fitting._checks import checked
from evodiff_jax.fitting._offsets import Offsets, realise
from evodiff_jax.fitting._teacher import bind, converge, in_batches
from evodiff_jax.sampling import init, sample, update
from evodiff_jax.schedules import NoiseSchedule
from evodiff_jax.tables import Plan
from evodiff_jax.types import check_keys, widest

RATE = 0.03  # of Adam at the first step; falls to 0 as a cosine
CHUNKS = 20  # times that the validation error is taken in a fit
PATIENCE = 10  # validations without a better plan after which a fit ends
_STRIDE = 0.2  # of x_T's move at a step, in units of its radius


class Figures(NamedTuple):
    """Errors of a plan's samples: for each sample the root mean square difference from its converged sample.

    Attributes:
      median: the median over samples.
      rms: the root mean square over samples.
      mean: the mean over samples.
    """

    median: float
    rms: float
    mean: float


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
      teacher_calls: model calls for the teacher's samples, each for one sample.
      forward_calls: the same without a gradient: of validation and test.
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
    target: Any


class _Candidate(NamedTuple):
    """A plan of the fit, and the errors of its samples on the validation part."""

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
    params: Any = None,
    condition: Any = None,
    teacher: Plan | None = None,
    target: Any = None,
    offsets: Offsets | None = None,
    loss: str = "mean",
    error: Callable[[Any, Any], Any] | None = None,
    optimizer: Any = None,
    steps: int = 400,
    batch: int = 16,
    validation: float = 0.25,
    test: float = 0.25,
    outputs: int = 4,
    radius: float = 0.0,
    remat: bool = False,
    progress: bool | Callable[[int, float], Any] = True,
) -> Fitted:
    """Fits a plan's times and weights to a model: the samples of few calls come near those of many.

    Args:
      denoise: the data prediction as it will be used, guidance included: denoise(x, t), with params before x where
        params are given and condition after t where that is.
      schedule: the schedule of denoise and plan.
      plan: the start, see `start_of`; its calls and ends are those of the fitted plan.
      x_T: (N, ...) noise at the plan's first time, N >= 8, or a pytree of such. By position the first are for
        training, then those for validation, then those for the test.
      key: a random key, which chooses the batches. The same key and arguments give the same plan.
      params: None, or a pytree of arrays, the network's weights. Weights that `denoise` closes over become constants
        of the compiled programs.
      condition: None, or a pytree of arrays (N, ...), what `denoise` takes for each sample.
      teacher: the plan whose samples are aimed at; None for `default_teacher`.
      target: the teacher's samples of x_T from `converge`, where they are already made; for the report, `teacher`
        is still the plan that made them.
      offsets: where the descent begins, such as those fitted to another model; None for the plan itself.
      loss: "mean", the mean over samples of the error; or "mean_square", which a few samples that end in another mode
        decide.
      error: error(x, target) -> (B,), not negative, such as a distance of features; None for the root mean square
        difference of a sample.
      optimizer: an optax.GradientTransformation; None for Adam with a rate that falls from 0.03 to 0 as a cosine.
      steps: of the optimizer, at most: a fit ends after 10 of 20 validations without a better plan.
      batch: samples a step, fewer where the training part is smaller.
      validation: the fraction of x_T that decides between the plans of the fit, the start among them.
      test: the fraction of x_T for the report's figures.
      outputs: see `start_of`.
      radius: how far each noise of the training part may move towards one from which the fitted plan reaches the
        target, as a fraction of its root mean square, 0 to below 1 (the relaxation of LD3, arXiv 2405.15506,
        section 3.2). Validation and test are from x_T as it is.
      remat: as for `sample`: less memory for more evaluations of the model.
      progress: True for a bar in terminals, or progress(step, validation loss), called after each validation.

    Returns:
      The best plan on the validation part, with the report. Ctrl-C after the first validation returns the best so far.

    Raises:
      TypeError: when an argument is something else.
      ValueError: when the plan can't be a start, the teacher has fewer calls or other ends, schedules differ, there are
        too few samples, or the teacher's samples are not finite.
      ModuleNotFoundError: without the extra `fit`.

    Examples:
      >>> import jax, evodiff_jax as ed
      >>> from evodiff_jax import fitting
      >>> schedule = ed.schedules.edm()
      >>> denoise = ed.denoisers.gaussian_mixture(schedule, [[-1.0, 0.0], [1.0, 0.5]], 0.1)
      >>> start = ed.plan(schedule, ed.grids.log_snr(schedule, 4), ed.solvers.dpm_solver_pp(2))
      >>> x_T = schedule.noise(jax.random.key(0), (128, 2))
      >>> fitted = fitting.fit(denoise, schedule, start, x_T, key=jax.random.key(1), steps=60)
      >>> fitted.report.fitted.median < 0.7 * fitted.report.start.median
      True
    """
    require("optax", *(["tqdm"] if progress is True else []), extra="fit")
    import optax

    began = time.monotonic()
    start, begin, teacher, x_T, parts = checked(
        denoise,
        schedule,
        plan,
        x_T,
        condition,
        teacher,
        target,
        offsets,
        loss,
        error,
        steps,
        batch,
        validation,
        test,
        outputs,
        radius,
    )
    key = check_keys(key, 0)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps)) if optimizer is None else optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an optax.GradientTransformation, got {optimizer!r}")
    batch, error = min(int(batch), parts[0]), _root_mean_square if error is None else error
    at_a_time = min(8 * batch, sum(parts))  # without a gradient
    taught = 0 if target is not None else int(teacher.calls) * sum(parts)
    if target is None:
        target = converge(denoise, x_T, teacher, params=params, condition=condition, batch=at_a_time)

    @jax.jit
    def judge(plan: Plan, params: Any, *data: Any) -> Any:
        noise, condition, target = data
        return error(sample(bind(denoise, params, condition), noise, plan), target)

    def errors(plan: Plan, data: _Data) -> np.ndarray:
        return in_batches(functools.partial(judge, plan, params), data, at_a_time).astype(np.float64)

    ends = np.cumsum(parts)
    train, validate, unseen = (
        _Data(*jax.tree.map(lambda leaf: jnp.asarray(leaf[last - count : last]), (x_T, condition, target)))  # noqa: B023
        for count, last in zip(parts, ends, strict=True)
    )
    of_start = realise(start, start.zeros(), schedule)

    def value(xp: Any, errors: Any) -> Any:
        return xp.mean(errors if loss == "mean" else errors**2)

    def objective(offsets: Offsets, noise: Any, params: Any, data: _Data) -> Any:
        moved = realise(start, offsets, schedule)
        x = _differentiably(bind(denoise, params, data.condition), noise, moved, int(plan.calls), remat)
        return value(jnp, error(x, data.target))

    @jax.jit
    def advance(carry: Any, i: Any, params: Any, train: _Data, key: jax.Array) -> Any:
        offsets, state, noise = carry
        chosen = jax.random.choice(jax.random.fold_in(key, i), parts[0], (batch,), replace=False)
        part = jax.tree.map(lambda leaf: leaf[chosen], train)
        arguments = offsets, jax.tree.map(lambda leaf: leaf[chosen], noise), params, part
        if radius:
            gradient, of_noise = jax.grad(objective, (0, 1))(*arguments)
            near = _moved(arguments[1], of_noise, part.noise, radius)
            noise = jax.tree.map(lambda leaf, new: leaf.at[chosen].set(new), noise, near)
        else:
            gradient = jax.grad(objective)(*arguments)
        updates, state = optimizer.update(gradient, state, offsets)
        return optax.apply_updates(offsets, updates), state, noise

    candidates = [_Candidate(0, start.zeros(), of_start, errors(of_start, validate))]
    if offsets is not None:
        moved = realise(start, begin, schedule)
        candidates.append(_Candidate(0, begin, moved, errors(moved, validate)))
    first = candidates[0]
    if not np.isfinite(first.errors).any():
        raise ValueError("no error of the start's samples is finite: the start is unusable, take another solver")
    loss_of = lambda candidate: float(value(np, candidate.errors))
    best = min(candidates, key=lambda candidate: np.nan_to_num(loss_of(candidate), nan=np.inf))
    first_offsets = jax.tree.map(lambda leaf: jnp.asarray(leaf, widest(jax.tree.leaves(x_T))), begin)
    carry = first_offsets, optimizer.init(first_offsets), train.noise
    done = validations = best_at = 0
    interrupted = False
    marks = set(np.ceil(np.linspace(0, steps, CHUNKS + 1)[1:]).astype(int).tolist())
    ticks, tell = _teller(progress, steps)
    try:
        for i in ticks:
            carry = advance(carry, i, params, train, key)
            done = i + 1
            if done not in marks:
                continue
            moves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), carry[0])
            if not all(np.isfinite(leaf).all() for leaf in moves):
                break  # and those of all later steps would be no better
            moved = realise(start, moves, schedule)
            found = _Candidate(done, moves, moved, errors(moved, validate))
            validations += 1
            if np.isfinite(loss_of(found)) and not loss_of(best) <= loss_of(found):
                best, best_at = found, validations
            tell(done, loss_of(best))
            if validations - best_at == PATIENCE:
                break
    except KeyboardInterrupt:
        interrupted = True
    calls = int(plan.calls)
    report = Report(
        start=_figures(errors(of_start, unseen)),
        fitted=_figures(errors(best.plan, unseen)),
        validation_start=_figures(first.errors),
        validation_fitted=_figures(best.errors),
        samples=parts,
        steps=done,
        best_step=best.step,
        teacher_calls=taught,
        forward_calls=calls * ((len(candidates) + validations) * parts[1] + 2 * parts[2]),
        gradient_calls=calls * batch * done,
        seconds=time.monotonic() - began,
        interrupted=interrupted,
    )
    card = {
        "loss": loss,
        "radius": float(radius),
        "teacher_calls": int(teacher.calls),
        "key": jax.random.key_data(key).tolist(),
    }
    return Fitted(best.plan, report, best.offsets, card)


def _differentiably(denoise: Callable[[Any, Any], Any], x_T: Any, plan: Plan, calls: int, remat: bool) -> Any:
    """`sample`, on CPUs written out call by call.

    XLA's CPU code for the gradient of a convolution is several times slower inside any loop (jax issue 12868).
    Elsewhere the loop compiles in a fraction of the time.
    """
    if jax.default_backend() != "cpu":
        return sample(denoise, x_T, plan, remat=remat)
    state = init(x_T, plan)
    called = jax.checkpoint(denoise) if remat else denoise
    for _ in range(calls):
        state = update(state, called(state.x, state.t), plan)
    return state.x


def _moved(noise: Any, gradient: Any, around: Any, radius: float) -> Any:
    """A step of each noise against its gradient, and back into the ball around the original one."""
    size = lambda tree: jnp.sqrt(_mean_square(tree) + jnp.finfo(jnp.float32).tiny)
    most = radius * size(around)
    scaled = lambda tree, factor: jax.tree.map(
        lambda leaf: leaf * factor.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype), tree
    )
    stepped = jax.tree.map(jnp.subtract, noise, scaled(gradient, _STRIDE * most / size(gradient)))
    apart = jax.tree.map(jnp.subtract, stepped, around)
    return jax.tree.map(jnp.add, around, scaled(apart, jnp.minimum(1.0, most / size(apart))))


def _root_mean_square(x: Any, target: Any) -> Any:
    """The root mean square difference of each sample from its target, with a finite derivative where that is 0."""
    wide = widest(jax.tree.leaves(x))
    apart = jax.tree.map(lambda a, b: a.astype(wide) - b.astype(wide), x, target)
    return jnp.sqrt(_mean_square(apart) + jnp.finfo(wide).tiny)


def _mean_square(tree: Any) -> Any:
    """The mean square of each sample over all its numbers, (B,)."""
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum(leaf.reshape(len(leaf), -1) ** 2, axis=1) for leaf in leaves]
    return sum(squares) / sum(leaf[0].size for leaf in leaves)


def _figures(errors: np.ndarray) -> Figures:
    return Figures(float(np.median(errors)), float(np.sqrt(np.mean(errors**2))), float(np.mean(errors)))


def _teller(progress: Any, steps: int) -> tuple[Iterator[int], Callable[[int, float], Any]]:
    """The numbers of the steps, and what is called after each validation."""
    if callable(progress):
        return iter(range(steps)), progress
    if not progress:
        return iter(range(steps)), lambda step, value: None
    from tqdm import tqdm

    bar = tqdm(range(steps), desc="fit", unit="step", disable=None)
    return iter(bar), lambda step, value: bar.set_postfix(validation=f"{value:.4g}", refresh=False)
