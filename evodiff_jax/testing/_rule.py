"""Whether a rule chooses finite coefficients for each sample, whatever the model."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evodiff_jax import grids
from evodiff_jax.numerics import enable_x64
from evodiff_jax.sampling import expect_solver
from evodiff_jax.schedules import edm, flow
from evodiff_jax.tables import Choice, Plan, Rule, Solver
from evodiff_jax.testing import _runs, _tables
from evodiff_jax.testing._runs import Model
from evodiff_jax.testing._solver import difference, padded, state

_CONSTANT = 0.05  # of their size: what samples of a constant model may differ; 0.006 is the most in the package
_ALONE = 1e-4  # of their size: what a sample in float32 may change with the others of its batch
_HARD = {
    "whose outputs are all 0": Model(0.0, 0.0),
    "whose outputs are all 0.3": Model(0.0, 0.3),
    "whose outputs are all 1e-25": Model(0.0, 1e-25),
    "whose outputs are all 1e15": Model(0.0, 1e15),
    "with outputs of about 1e-25": Model(1e-25, 0.0),
    "with outputs of about 1e-20": Model(1e-20, 0.0),
    "with outputs of about 1e-15": Model(1e-15, 0.0),
    "with outputs of about 1e-8": Model(1e-8, 0.0),
    "with outputs of about 1e8": Model(1e8, 0.0),
    "with outputs of about 1e15": Model(1e15, 0.0),
    "with 0 for one of two channels": Model(1.0, 0.1, 0.0),
    "with smooth outputs": Model(),
}


class RuleReport(NamedTuple):
    """What `check_rule` measured.

    Attributes:
      sums: the number of sums over each sample that the rule reads.
      memory: the number of arrays that it remembers for each sample (and channel).
      constant_error: the largest difference of samples of a constant model from the exact ones, over their size, on
        grids of up to 8 steps. It is near 0 where coefficients of equal outputs add up to 0.
    """

    sums: int
    memory: int
    constant_error: float


def check_rule(solver: Solver) -> RuleReport:
    """Checks the rule of a solver, beside what `check_solver` checks of every solver.

    * Its functions stand at the top of a module, so that plans have one program and can be exported.
    * `terms` returns arrays like the state; `choose` returns a coefficient for each output, in the precision of the
      sums, and a memory of the structure, shapes and precision of that of `init`.
    * Samples and gradients in float32 are finite for models whose outputs are constant, zero, tiny or huge, or zero in
      one channel, and in runs from alpha = 0 to sigma = 0 for which its table is finite.
    * Each sample has its choice, whatever the others of its batch are.
    * Where the solver keeps constants, samples of a constant model are within 5 % of the exact ones.

    Args:
      solver: yours, with a rule.

    Returns:
      What was measured.

    Raises:
      TypeError: when solver is no Solver.
      ValueError: when it has no rule, and for the first check that fails.

    Examples:
      >>> import evodiff_jax as ed
      >>> check_rule(ed.solvers.evodiff()).sums
      3
    """
    expect_solver(solver)
    rule = solver.rule
    if rule is None:
        raise ValueError(f"solver {solver.name!r} has no rule: check_solver alone is for it")
    _check_functions(solver.name, rule)
    of_run = _tables.Case("log_snr(schedule, 5) of edm()", edm(), grids.log_snr(edm(), 5))
    sums, memory = _check_shapes(solver, rule, _tables.plan_of(solver, of_run))
    _check_alone(solver, of_run)
    for case in _cases(solver, of_run):
        _check_hard_models(solver, case)
    error = _constant_error(solver) if solver.keeps_constants else 0.0
    if not error < _CONSTANT:
        raise ValueError(
            f"rule of {solver.name!r}: samples of a constant model differ by {error:.3g} of their size from the exact "
            "ones: coefficients for outputs that are all the same should add up to 0 (or say keeps_constants=False)"
        )
    return RuleReport(sums, memory, error)


def _cases(solver: Solver, first: _tables.Case) -> Iterator[_tables.Case]:
    yield first
    yield _tables.Case("time_uniform(schedule, 7) of edm()", edm(), grids.time_uniform(edm(), 7))
    whole = flow(t_min=0.0, t_max=1.0)  # from alpha = 0 to sigma = 0
    for steps in _tables.STEPS:
        case = _tables.Case(
            f"time_uniform(schedule, {steps}) of flow(t_min=0, t_max=1)", whole, grids.time_uniform(whole, steps)
        )
        try:
            with np.errstate(all="ignore"):
                _tables.plan_of(solver, case)
        except ValueError:
            return  # the solver is not for such runs
        yield case


def _check_functions(name: str, rule: Rule) -> None:
    for of in ("terms", "choose", "init"):
        fn = getattr(rule, of)
        qualified = getattr(fn, "__qualname__", "<locals>")
        if "<locals>" in qualified or "<lambda>" in qualified:
            raise ValueError(
                f"rule of {name!r}: {of} is {fn!r}, no function at the top of a module: each new one would compile a "
                "program of its own, and plans could not be exported; put parameters into Table.data"
            )


def _check_shapes(solver: Solver, rule: Rule, plan: Plan) -> tuple[int, int]:
    """Traces the three functions for one sample in float64."""
    where = f"rule of {solver.name!r}"
    slots = plan.table.predictor.shape[1]
    with enable_x64():
        x = jax.ShapeDtypeStruct(_runs.SHAPE, jnp.float64)
        data = jax.tree.map(lambda column: jax.ShapeDtypeStruct(column.shape[1:], jnp.float64), plan.table.data)
        terms = jax.eval_shape(lambda data, x: rule.terms(data, x, lambda j: x), data, x)
        if not isinstance(terms, tuple) or not terms:
            raise ValueError(f"{where}: terms must return a tuple of arrays like x, it returned {type(terms).__name__}")
        for i, term in enumerate(terms):
            if (term.shape, term.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"{where}: term {i} must be like x, {x.dtype} {x.shape}, it is {term.dtype} {term.shape}: the "
                    "library makes the sums, over each sample; constants must not lower the precision"
                )
        floats = lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        )
        memory = jax.tree.map(floats, jax.eval_shape(lambda data: jax.tree.map(jnp.asarray, rule.init(data)), data))
        numbers = tuple(jax.ShapeDtypeStruct((), jnp.float64) for _ in terms)
        returned = jax.eval_shape(rule.choose, data, numbers, memory)
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], Choice):
            raise ValueError(f"{where}: choose must return (Choice, memory), it returned {type(returned).__name__}")
        choice, following = returned
        for column in ("predictor", "corrector"):
            chosen = getattr(choice, column)
            if (chosen.shape, chosen.dtype) != ((slots,), jnp.float64):
                raise ValueError(
                    f"{where}: for sums in float64 the {column} coefficients must be float64 ({slots},), one for each "
                    f"output, they are {chosen.dtype} {chosen.shape}: constants must not lower the precision"
                )
        described = lambda tree: [f"{leaf.dtype} {leaf.shape}" for leaf in jax.tree.leaves(tree)]
        if jax.tree.structure(memory) != jax.tree.structure(following) or described(memory) != described(following):
            raise ValueError(
                f"{where}: the memory that choose returns must be like that of init, {described(memory)}, it is "
                f"{described(following)}"
            )
    return len(terms), len(jax.tree.leaves(memory))


def _check_alone(solver: Solver, case: _tables.Case) -> None:
    plan, keys = padded(_tables.plan_of(solver, case)), _runs.keys()
    x_T, others = (state(plan, case.schedule, jnp.float32, seed) for seed in (0, 1))
    x, among = (
        np.asarray(_runs.run_and_gradients(Model(), batch, plan, keys)[0]) for batch in (x_T, others.at[0].set(x_T[0]))
    )
    if not (apart := difference(x[0], among[0])) < _ALONE:
        raise ValueError(
            f"rule of {solver.name!r} on {case.name}: a sample changes by {apart:.3g} of its size when the others of "
            "its batch are replaced: terms must not reduce over the batch axis"
        )


def _check_hard_models(solver: Solver, case: _tables.Case) -> None:
    plan = padded(_tables.plan_of(solver, case))
    x_T = state(plan, case.schedule, jnp.float32)
    for name, model in _HARD.items():
        found = _runs.run_and_gradients(model, x_T, plan, _runs.keys())
        for what, tree in zip(("samples", "gradients"), found, strict=True):
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
                raise ValueError(
                    f"rule of {solver.name!r} on {case.name}: {what} in float32 are not finite for a model {name}: "
                    "where a sum may be 0, tiny or huge, replace it by 1 with jnp.where before dividing, and bound it "
                    "before squaring"
                )


def _constant_error(solver: Solver) -> float:
    """Of several schedules and grids."""
    constant, errors = 0.7, []
    for case in _tables.cases(None):
        plan = padded(_tables.plan_of(solver, case))
        if plan.table.noise is not None:
            return 0.0
        alpha, sigma, _ = case.schedule.levels(case.times[[0, -1]])
        x_T = state(plan, case.schedule, jnp.float32)
        x = _runs.run_and_gradients(Model(0.0, constant), x_T, plan, _runs.keys())[0]
        errors.append(difference(x, alpha[1] * constant + sigma[1] / sigma[0] * (x_T - alpha[0] * constant)))
    return max(errors)
