"""JAX's ways to run a sampler: many devices, export, donation, memory of gradients, debugging switches, precision."""

import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import SCHEDULES, SOLVERS, initial_state

import evodiff_jax as ed
from evodiff_jax.solvers import FORMS

EDM = SCHEDULES["edm"]
SHAPE = (8, 16, 16, 3)
STATE_BYTES = 4 * np.prod(SHAPE)
KINDS = ("evodiff", "variance_optimal", "unipc-2", "heun", "ddim")
solvers = pytest.mark.parametrize("name", KINDS)


def but_slow(*quick, names=KINDS):
    """All of the solvers, of which the quick ones alone are among the default tests."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names if name not in quick]
    return pytest.mark.parametrize("name", [*quick, *slow])


def plan_of(name, steps, **options):
    return ed.plan(EDM, ed.grids.log_snr(EDM, steps), FORMS[name].make(), **options)


def deep(x, t):
    """A network whose activations are 64 times its input."""
    for _ in range(4):
        x = jnp.tanh(jnp.concatenate([x] * 16, axis=-1) + t).reshape(*x.shape, 16).mean(-1)
    return x


def temporary_states(name, steps, remat):
    """Temporary memory of a gradient, in states."""
    plan = plan_of(name, steps)
    loss = lambda x: jnp.sum(ed.sample(deep, x, plan, remat=remat) ** 2)
    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(SHAPE, jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / STATE_BYTES


@but_slow()
def test_memory_of_rematerialised_gradients_is_nearly_flat_in_the_number_of_steps(name, optimized):
    few, many = (temporary_states(name, steps, remat=True) for steps in (9, 100))
    kept = temporary_states(name, 100, remat=False)
    print(f"{name}: {few:.0f} states of temporary memory at 9 steps, {many:.0f} at 100; {kept:.0f} without remat")
    assert many < few + 100  # 91 steps more, whose activations are 64 states and more each
    assert kept > 40 * 100


@but_slow("unipc-2")
def test_x_t_can_be_donated(name, optimized):
    plan = plan_of(name, 4)
    run = lambda x: ed.sample(lambda x, t: x / (1 + t**2), x, plan)
    x_T = initial_state(EDM, SHAPE)
    kept = jax.jit(run)(x_T)
    analysis = jax.jit(run, donate_argnums=0).lower(x_T).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == STATE_BYTES
    x = jax.jit(run, donate_argnums=0)(x_T)
    assert x_T.is_deleted()
    np.testing.assert_array_equal(x, kept)


def on_eight_devices(names, code):
    """The output of a program that sees eight CPU devices."""
    start = """
        import os
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import re
        import jax
        import jax.numpy as jnp
        import numpy as np
        import evodiff_jax as ed
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

        assert jax.device_count() == 8
        jax.config.update("jax_disable_most_optimizations", True)
    """
    code = textwrap.dedent(start) + names + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize(
    ("solvers", "forms"),
    [
        pytest.param("s.unipc(3),", 1, marks=pytest.mark.slow),
        pytest.param("s.evodiff(), s.variance_optimal(), s.sde_dpm_solver_pp(2)", 5, marks=pytest.mark.slow),
    ],
    ids=["quick", "rules and noise"],
)
def test_a_batch_over_eight_devices_runs_without_communication_and_gives_the_same_samples(solvers, forms):
    out = on_eight_devices(
        f"names = lambda s: ({solvers})\n",
        """
        mesh = Mesh(np.array(jax.devices()), ("batch",))
        split, whole = (NamedSharding(mesh, P(*axes)) for axes in (("batch",), ()))
        schedule = ed.schedules.vp_linear()
        times = ed.grids.log_snr(schedule, 6)
        x_T = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
        label = jnp.arange(16.0)
        params = jax.random.normal(jax.random.key(1), (3, 3))
        keys = jax.random.split(jax.random.key(2), 16)

        def sampler(plan, batched):
            def run(params, x_T, label, key):
                def network(x, t, label):
                    return jnp.tanh(x @ params + t + label[:, None, None, None] / 16)

                denoise = ed.denoisers.from_prediction(network, schedule, "v")
                denoise = ed.denoisers.classifier_free_guidance(
                    denoise, label, 0 * label, 2.0, batched=batched, rescale=0.7, interval=(0.1, 5.0), schedule=schedule
                )
                denoise = ed.denoisers.dynamic_threshold(denoise)
                known, mask = jnp.zeros_like(x_T), jnp.arange(8)[:, None, None] < 2
                denoise, on_state = ed.editing.inpaint(denoise, known, mask, schedule, key=key)
                return ed.sample(denoise, x_T, plan, key=key, on_state=on_state)

            return run

        for solver in names(ed.solvers):
            plan = ed.plan(schedule, times, solver, max_calls=8)
            for batched in (True, False) if solver.rule else (True,):
                run = sampler(plan, batched)
                alone = jax.jit(run)(params, x_T, label, keys)
                sharded = jax.jit(run, in_shardings=(whole, split, split, split), out_shardings=split)
                compiled = sharded.lower(params, x_T, label, keys).compile()
                pattern = r"all-reduce|all-gather|all-to-all|collective-\\w+|reduce-scatter"
                found = re.findall(pattern, compiled.as_text())
                assert not found, (solver.name, set(found))
                x = sharded(params, jax.device_put(x_T, split), jax.device_put(label, split), keys)
                assert len(x.sharding.device_set) == 8 and x.addressable_shards[0].data.shape == (2, 8, 8, 3)
                np.testing.assert_allclose(x, alone, rtol=2e-5, atol=2e-5)
                print(solver.name)
    """,
    )
    assert len(out.split()) == forms


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["sa_solver"], marks=pytest.mark.slow),
        pytest.param(["ddim", "heun", "unipc-2", "ipndm-4", "evodiff", "variance_optimal"], marks=pytest.mark.slow),
    ],
    ids=["quick", "others"],
)
def test_shard_map_explicit_meshes_and_pmap_give_the_same_samples(names):
    """With JAX's default checks: every carry of the loop has the type of the state."""
    out = on_eight_devices(
        f"names = {names}\n",
        """
        schedule = ed.schedules.edm()
        times = ed.grids.log_snr(schedule, 4)
        keys = jax.random.split(jax.random.key(2), 8)
        x_T = schedule.noise(keys, (8, 8, 4, 3))
        denoise = lambda x, t: x / (1 + t**2) + 0.1 * jnp.tanh(x)
        hook = lambda x, t, index, key: 0.99 * x
        loss = lambda x, plan, key, remat: jnp.sum(ed.sample(denoise, x, plan, key=key, remat=remat) ** 2)
        axis = jax.sharding.AxisType

        def close(name, actual, expected):
            equal = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4, err_msg=name)
            jax.tree.map(equal, actual, expected)

        for name in names:
            plan = ed.plan(schedule, times, ed.solvers.FORMS[name].make(), max_calls=10)
            x = ed.sample(denoise, x_T, plan, key=keys)
            traced = ed.sample_with_trace(denoise, x_T, plan, key=keys, on_state=hook)
            gradient = jax.grad(loss)(x_T, plan, keys, False)

            mesh = jax.make_mesh((8,), ("b",), axis_types=(axis.Auto,))
            specs = (P("b"), P(), P("b"))
            mapped = lambda fn, out=P("b"): jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out))
            close(name, mapped(lambda x, p, k: ed.sample(denoise, x, p, key=k))(x_T, plan, keys), x)
            states = P(None, "b")
            trace = lambda x, p, k: ed.sample_with_trace(denoise, x, p, key=k, on_state=hook)[1][1:]
            close(name, mapped(trace, states)(x_T, plan, keys), traced[1][1:])
            close(name, mapped(lambda x, p, k: jax.grad(loss)(x, p, k, True))(x_T, plan, keys), gradient)

            mesh = jax.make_mesh((8,), ("b",), axis_types=(axis.Explicit,))
            with jax.set_mesh(mesh):
                for spec in (P("b"), P(None, "b")):
                    split = jax.device_put(x_T, NamedSharding(mesh, spec))
                    found = jax.jit(lambda x, p: ed.sample(denoise, x, p, key=keys))(split, plan)
                    assert found.sharding.spec == P(*spec, *[None] * (4 - len(spec))), found.sharding
                    close(name, np.asarray(found), x)
                split = jax.device_put(x_T, NamedSharding(mesh, P("b")))
                trace = lambda x, p: ed.sample_with_trace(denoise, x, p, key=keys, on_state=hook)[0]
                close(name, np.asarray(jax.jit(trace)(split, plan)), traced[0])
                close(name, np.asarray(jax.jit(jax.grad(lambda x, p: loss(x, p, keys, True)))(split, plan)), gradient)

            each = jax.pmap(lambda x, key: ed.sample(denoise, x, plan, key=key))
            close(name, each(x_T[:, None], keys[:, None])[:, 0], x)
            print(name)
    """,
    )
    assert out.split() == names


@but_slow("variance_optimal")
def test_a_sampler_of_plans_is_exported_for_every_platform_and_read_back(name):
    """Lowering for TPUs and GPUs needs neither."""
    export = pytest.importorskip("jax.export")
    pytest.importorskip("flatbuffers")
    key = jax.random.key(0)
    run = jax.jit(lambda x, plan: ed.sample(lambda x, t: x / (1 + t**2), x, plan, key=key))
    x_T, plan = initial_state(EDM, (2, 4, 4, 3)), plan_of(name, 5, max_calls=12)
    exported = export.export(run, platforms=("cpu", "tpu", "cuda"))(x_T, plan)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    again = export.deserialize(bytearray(exported.serialize()))
    for other in (plan, plan_of(name, 3, max_calls=12)):
        np.testing.assert_allclose(
            again.call(x_T, jax.tree.map(jnp.asarray, other)), run(x_T, other), rtol=1e-5, atol=1e-6
        )


def test_a_rule_of_a_closure_is_not_exported():
    export = pytest.importorskip("jax.export")
    from evodiff_jax.tables import Choice, Rule, Solver

    solver = ed.solvers.ddim()
    rule = Rule(lambda d, x, output: (output(0),), lambda d, s, m: (Choice(jnp.zeros(1), jnp.zeros(1)), m))
    plan = ed.plan(EDM, ed.grids.log_snr(EDM, 3), Solver("mine", solver.table, rule))
    run = jax.jit(lambda x, plan: ed.sample(lambda x, t: x, x, plan))
    with pytest.raises(ValueError, match="rules of functions at the top of a module only"):
        export.export(run)(jnp.ones((2, 3)), plan).serialize()


@but_slow("unipc-2")
def test_it_runs_under_jaxs_debugging_switches(name):
    key, x_T = jax.random.key(0), initial_state(EDM, (2, 4, 4, 3))
    plan = jax.tree.map(jnp.asarray, plan_of(name, 4, max_calls=9))
    run = jax.jit(lambda x, plan, key: ed.sample(lambda x, t: x / (1 + t**2), x, plan, key=key))
    with jax.checking_leaks():
        expected = run(x_T, plan, key)
    with jax.debug_nans(True), jax.debug_infs(True):
        np.testing.assert_allclose(run(x_T, plan, key), expected)
        jax.jit(jax.grad(lambda x: jnp.sum(run(x, plan, key) ** 2)))(x_T)
    with jax.transfer_guard("disallow"):
        run(x_T, plan, key)


@solvers
def test_tables_are_never_rounded_to_bfloat16(name):
    """A bfloat16 network between float32 states: nothing of the run's own is computed in bfloat16."""

    def network(x, t):
        return x.astype(jnp.bfloat16) * jnp.bfloat16(0.5)

    denoise = ed.denoisers.from_prediction(network, EDM, "data")
    plan = plan_of(name, 6)
    text = jax.jit(lambda x: ed.sample(denoise, x, plan)).lower(initial_state(EDM, (2, 4, 4, 2))).as_text()
    in_bfloat16 = [line for line in text.splitlines() if re.search(r"-> .*bf16|: tensor<[^>]*bf16>$", line)]
    assert all(re.search(r"convert|multiply|constant|broadcast|call|func", line) for line in in_bfloat16), in_bfloat16
    assert sum("multiply" in line for line in in_bfloat16) == 1  # the network's own


@pytest.mark.parametrize(
    ("network_dtype", "dtype"),
    [
        (jnp.float32, jnp.float32),
        pytest.param(jnp.bfloat16, jnp.float32, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_last_step_is_finite_where_sigma_ends_at_0(network_dtype, dtype):
    """Of every deterministic family; those without a rule side by side."""
    schedule = ed.schedules.edm(0.0, 80.0)
    plans = [ed.plan(schedule, np.append(ed.grids.karras(EDM, 4), 0.0), make()) for make in SOLVERS.values()]
    network = lambda x, t: (x / (1 + t**2)).astype(network_dtype)
    denoise = ed.denoisers.from_prediction(network, schedule, "data")
    run = lambda plan: ed.sample(denoise, initial_state(schedule, (2, 4, 4, 2), dtype), plan)
    linear, ruled = ([plan for plan in plans if (plan.rule is None) == without] for without in (True, False))
    assert len(linear) == 9
    for x in (*jax.jit(jax.vmap(run))(ed.stack(linear)), *map(jax.jit(run), ruled)):
        assert x.dtype == dtype
        assert np.isfinite(x.astype(jnp.float32)).all()
