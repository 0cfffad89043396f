"""The step-by-step form of `sample`, for pipelines that own the loop and call the model themselves."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from evodiff_jax import kernel
from evodiff_jax.kernel import Carry
from evodiff_jax.states import as_state, check_state
from evodiff_jax.tables import Plan, row_at


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """A run in progress, a pytree of fixed shapes: it can live inside a jit, a scan or a fori_loop.

    Attributes:
      plan: the run's plan.
      carry: what the rows applied so far have left.
    """

    plan: Plan
    carry: Carry

    @property
    def x(self) -> jax.Array:
        """(B, ...), where the model is to be called; the sample once `done`."""
        return self.carry.x

    @property
    def t(self) -> jax.Array:
        """The scalar time at which the model is to be called; that of the last call once `done`."""
        return self.plan.table.time[jnp.minimum(self.carry.row, self.plan.calls - 1)]

    @property
    def done(self) -> jax.Array:
        """Whether the run is over, a boolean scalar."""
        return self.carry.row >= self.plan.calls


def init(x_T: ArrayLike, plan: Plan, key: jax.Array | None = None) -> State:
    """The state before the first model call.

    Args:
      x_T: (B, ...) noise at the first time, in the floating-point dtype of the run.
      plan: from `evodiff_jax.plan`.
      key: a JAX random key, for stochastic solvers.

    Returns:
      The state.

    Raises:
      TypeError: when x_T is not floating-point or `plan` is not a `Plan`.
      ValueError: when x_T has no batch axis, or a stochastic solver gets no key.

    Example:
      >>> import jax, evodiff_jax as ed
      >>> schedule = ed.schedules.edm()
      >>> x_T = schedule.t_max * jax.random.normal(jax.random.key(0), (4, 8))
      >>> state = ed.stepping.init(x_T, ed.plan(schedule, ed.grids.log_snr(schedule, 10)))
      >>> while not state.done:
      ...     prediction = state.x / (1 + state.t**2)  # your model's data prediction at (state.x, state.t)
      ...     state = ed.stepping.update(state, prediction)
      >>> state.x.shape
      (4, 8)
    """
    x_T = check_state(x_T, "x_T")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, from evodiff_jax.plan(schedule, times), got {plan!r}")
    plan = kernel.for_state(plan, x_T, key)
    # Arrays all through, so that the first state has the types of those that `update` returns.
    plan = dataclasses.replace(plan, calls=jnp.asarray(plan.calls, jnp.int32), denoises=jnp.asarray(plan.denoises))
    return State(plan, kernel.start(x_T, plan, key))


@jax.jit
def update(state: State, prediction: jax.Array) -> State:
    """The state after the model call at (state.x, state.t).

    Args:
      state: from `init` or the last `update`.
      prediction: the data prediction there, of the shape of state.x.

    Returns:
      The next state; the same state where the run is over.

    Raises:
      TypeError: when the prediction is not a floating-point array.
      ValueError: when it has another shape.
    """
    m = as_state(prediction, state.x, "denoise(x, t)")

    def apply(carry: Carry) -> Carry:
        return kernel.advance(state.plan, carry, row_at(state.plan.table, carry.row), m)[0]

    return State(state.plan, jax.lax.cond(state.done, lambda carry: carry, apply, state.carry))
