"""JAX transformations of the whole sampler: memory of gradients, donation, sharding, precision."""

import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, initial_state, mixture

import evodiff_jax as ed
from evodiff_jax.solvers import SOLVERS

EDM = SCHEDULES["edm"]
SHAPE = (8, 16, 16, 3)
STATE_BYTES = 4 * np.prod(SHAPE)
KINDS = ("evodiff", "unipc", "heun", "ddim")
solvers = pytest.mark.parametrize("name", KINDS)


def deep(x, t):
    """A network whose activations are 64 times its input."""
    for _ in range(4):
        x = jnp.tanh(jnp.concatenate([x] * 16, axis=-1) + t).reshape(*x.shape, 16).mean(-1)
    return x


@pytest.mark.parametrize(("name", "steps"), [("evodiff", 1), ("evodiff", 3), *((name, 7) for name in KINDS)])
def test_rematerialised_gradients_are_the_gradients(name, steps, x64):
    times, solver = ed.grids.log_snr(EDM, steps), SOLVERS[name]()
    x_T = initial_state(EDM, (2, 4, 4, 2), jnp.float64)

    def loss(scale, x_T, remat):
        denoise = lambda x, t: scale * mixture(EDM)(x, t)  # noqa: E731
        return jnp.sum(ed.sample(denoise, x_T, times, EDM, solver, remat=remat) ** 2)

    values = [jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(1.1, x_T, r) for r in (False, True)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *values)


def temporary_states(name, steps, remat):
    """Temporary memory of a gradient, in states."""
    times, solver = ed.grids.log_snr(EDM, steps), SOLVERS[name]()
    loss = lambda x: jnp.sum(ed.sample(deep, x, times, EDM, solver, remat=remat) ** 2)  # noqa: E731
    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(SHAPE, jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / STATE_BYTES


@solvers
def test_memory_of_rematerialised_gradients_is_nearly_flat_in_the_number_of_steps(name, optimized):
    few, many = (temporary_states(name, steps, remat=True) for steps in (9, 100))
    kept = temporary_states(name, 100, remat=False)
    print(f"{name}: {few:.0f} states of temporary memory at 9 steps, {many:.0f} at 100; {kept:.0f} without remat")
    assert many < few + 100  # 91 steps more, whose activations are 64 states and more each
    assert kept > 40 * 100


@solvers
def test_x_t_can_be_donated(name, optimized):
    times, solver = ed.grids.log_snr(EDM, 4), SOLVERS[name]()
    run = lambda x: ed.sample(lambda x, t: x / (1 + t**2), x, times, EDM, solver)  # noqa: E731
    x_T = initial_state(EDM, SHAPE)
    kept = jax.jit(run)(x_T)
    analysis = jax.jit(run, donate_argnums=0).lower(x_T).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == STATE_BYTES
    x = jax.jit(run, donate_argnums=0)(x_T)
    assert x_T.is_deleted()
    np.testing.assert_array_equal(x, kept)


SHARDED = """
    import re
    import jax
    import jax.numpy as jnp
    import numpy as np
    import evodiff_jax as ed
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    assert jax.device_count() == 8
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    schedule = ed.schedules.vp_linear()
    times = ed.grids.log_snr(schedule, 6)
    x_T = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    label = jnp.arange(16.0)
    params = jax.random.normal(jax.random.key(1), (3, 3))

    def sampler(solver, batched):
        def run(params, x_T, label, key):
            def network(x, t, label):
                return jnp.tanh(x @ params + t + label[:, None, None, None] / 16)

            denoise = ed.denoisers.from_prediction(network, schedule, "v")
            denoise = ed.denoisers.classifier_free_guidance(
                denoise, label, 0 * label, 2.0, batched=batched, rescale=0.7, interval=(0.1, 5.0), schedule=schedule
            )
            denoise = ed.denoisers.dynamic_threshold(denoise)
            known, mask = jnp.zeros_like(x_T), jnp.arange(8)[:, None, None] < 2
            denoise, on_state = ed.editing.inpaint(denoise, known, mask, schedule, key)
            return ed.sample(denoise, x_T, times, schedule, solver, key=key, on_state=on_state)

        return run

    s = ed.solvers
    for solver in (s.evodiff(), s.unipc(3), s.sde_dpm_solver_pp(2)):
        for batched in (True, False) if solver.rule else (True,):
            run = sampler(solver, batched)
            alone = jax.jit(run)(params, x_T, label, jax.random.key(2))
            sharded = jax.jit(run, in_shardings=(whole, split, split, whole), out_shardings=split)
            compiled = sharded.lower(params, x_T, label, jax.random.key(2)).compile()
            found = re.findall(r"all-reduce|all-gather|all-to-all|collective-\\w+|reduce-scatter", compiled.as_text())
            assert not found, (solver.name, set(found))
            x = sharded(params, jax.device_put(x_T, split), jax.device_put(label, split), jax.random.key(2))
            assert len(x.sharding.device_set) == 8 and x.addressable_shards[0].data.shape == (2, 8, 8, 3)
            np.testing.assert_allclose(x, alone, rtol=2e-5, atol=2e-5)
            print(solver.name)
"""


def test_a_batch_over_eight_devices_runs_without_communication_and_gives_the_same_samples():
    code = 'import os\nos.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"\n'
    code += 'os.environ["JAX_PLATFORMS"] = "cpu"\n' + textwrap.dedent(SHARDED)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(result.stdout.split()) == 4


@solvers
def test_tables_are_never_rounded_to_bfloat16(name):
    """A bfloat16 network between float32 states: nothing of the run's own is computed in bfloat16."""

    def network(x, t):
        return x.astype(jnp.bfloat16) * jnp.bfloat16(0.5)

    denoise = ed.denoisers.from_prediction(network, EDM, "data")
    x_T, times = initial_state(EDM, (2, 4, 4, 2)), ed.grids.log_snr(EDM, 6)
    text = jax.jit(lambda x: ed.sample(denoise, x, times, EDM, SOLVERS[name]())).lower(x_T).as_text()
    in_bfloat16 = [line for line in text.splitlines() if re.search(r"-> .*bf16|: tensor<[^>]*bf16>$", line)]
    assert all(re.search(r"convert|multiply|constant|broadcast|call|func", line) for line in in_bfloat16), in_bfloat16
    assert sum("multiply" in line for line in in_bfloat16) == 1  # the network's own


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("network_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_is_finite_where_sigma_ends_at_0(name, dtype, network_dtype):
    schedule = ed.schedules.edm(0.0, 80.0)
    times = np.append(ed.grids.karras(EDM, 4), 0.0)
    network = lambda x, t: (x / (1 + t**2)).astype(network_dtype)  # noqa: E731
    denoise = ed.denoisers.from_prediction(network, schedule, "data")
    x = ed.sample(denoise, initial_state(schedule, (2, 4, 4, 2), dtype), times, schedule, SOLVERS[name]())
    assert x.dtype == dtype
    assert np.isfinite(x.astype(jnp.float32)).all()
