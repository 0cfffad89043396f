"""Solvers compared on a model: the same noise, exact numbers of calls, resumable runs, honest figures."""

import jax.numpy as jnp
import numpy as np
import pytest

import evodiff_jax as ed
from evodiff_jax.evaluation import Problem, compare, converged, make_sampler, ratios, times_of
from evodiff_jax.evaluation.metrics import frechet_distance
from evodiff_jax.generation import _program
from evodiff_jax.solvers import FORMS

SCHEDULE = ed.schedules.edm(0.02, 20.0)
CENTERS = np.array([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])
DATA = CENTERS[np.arange(300) % 3] + np.random.default_rng(2).normal(0, 0.2, (300, 2))
CHOSEN = {name: FORMS[name].make for name in ("variance_optimal", "ddim", "dpm_solver_pp-2", "heun")}
GRIDS = {"log_snr": ed.grids.log_snr}


def problem(count=50, batch=16, denoise=None, **options):
    exact = ed.denoisers.gaussian_mixture(SCHEDULE, CENTERS, 0.2)
    return Problem(
        name="three modes",
        denoise=denoise or (lambda params, x, t, condition: params * exact(x, t)),
        params=1.0,
        schedule=SCHEDULE,
        noise=np.random.default_rng(0).normal(0, 20, (count, 2)).astype(np.float32),
        condition=None,
        features=lambda x: x,
        data=DATA,
        batch=batch,
        **options,
    )


def test_every_solver_takes_exactly_the_calls_it_is_given(tmp_path):
    for form in FORMS.values():
        make = form.make
        for calls in (5, 6, 8):
            times = times_of(SCHEDULE, ed.grids.log_snr, make(), calls)
            if form.calls == 2 and calls == 5:
                assert times is None
            else:
                assert ed.plan(SCHEDULE, times, make()).calls == calls


def test_figures_of_all_runs_and_what_they_mean(tmp_path):
    results = {(r.solver, r.calls): r for r in compare(problem(), GRIDS, [20, 6], tmp_path, CHOSEN, resamples=20)}
    assert len(results) == 8
    exact = converged(problem(), tmp_path)
    for (name, calls), result in results.items():
        x = make_sampler(problem(), CHOSEN[name](), 20)(times_of(SCHEDULE, ed.grids.log_snr, CHOSEN[name](), calls))
        errors = np.sqrt(np.mean((x - exact) ** 2, axis=1))
        assert result.median.value == pytest.approx(np.quantile(errors, 0.5, method="higher"), rel=1e-5)
        assert result.worst_tenth.value == pytest.approx(np.quantile(errors, 0.9, method="higher"), rel=1e-5)
        assert result.frechet.value == pytest.approx(frechet_distance(x, DATA), rel=1e-5)
        assert result.rms.value == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-5)
        for estimate in (result.frechet, result.kernel, result.median, result.worst_tenth, result.rms):
            assert estimate.low <= estimate.value <= estimate.high
        assert result.blown_up == 0
    for name in CHOSEN:
        assert results[name, 20].median.value < results[name, 6].median.value


def test_samples_do_not_depend_on_the_batch_and_keep_their_order():
    times = ed.grids.log_snr(SCHEDULE, 6)
    whole, parts = (make_sampler(problem(batch=b), ed.solvers.ddim(), 10)(times) for b in (50, 7))
    np.testing.assert_allclose(whole, parts, rtol=1e-5, atol=1e-6)


def test_what_has_been_made_is_not_made_again(tmp_path, monkeypatch):
    first = list(compare(problem(), GRIDS, [5, 6], tmp_path, CHOSEN, resamples=5))
    monkeypatch.setattr(_program, "sample", lambda *_: pytest.fail("sampled again"))
    assert list(compare(problem(), GRIDS, [5, 6], tmp_path, CHOSEN, resamples=5)) == first


def test_an_interrupted_comparison_goes_on(tmp_path):
    runs = compare(problem(), GRIDS, [5, 6], tmp_path, CHOSEN, resamples=5)
    begun = [next(runs), next(runs)]
    runs.close()
    assert len(list((tmp_path / "three modes").glob("*.npy"))) == 3  # the converged samples and two runs
    assert list(compare(problem(), GRIDS, [5, 6], tmp_path, CHOSEN, resamples=5))[:2] == begun


def test_samples_that_blow_up_are_counted_and_not_hidden(tmp_path):
    converged(problem(), tmp_path)  # of the sound model, under the same name
    exact = ed.denoisers.gaussian_mixture(SCHEDULE, CENTERS, 0.2)

    def denoise(params, x, t, condition):
        return jnp.where(condition["broken"][:, None], jnp.inf, exact(x, t))

    broken = problem(denoise=denoise)._replace(condition={"broken": np.arange(50) == 3})
    result = next(compare(broken, GRIDS, [6], tmp_path, CHOSEN, resamples=5))
    assert (result.blown_up, result.samples) == (1, 50)
    assert result.frechet.value == result.kernel.value == np.inf
    assert np.isfinite(result.median.value)


def test_ratios_to_the_best_peer_of_every_figure(tmp_path):
    results = list(compare(problem(), GRIDS, [6, 10], tmp_path, CHOSEN, resamples=5))
    peers = ("ddim", "dpm_solver_pp-2", "heun")
    found = list(ratios(problem(), results, tmp_path, "variance_optimal", peers, resamples=50))
    assert [(r.calls, r.figure) for r in found] == [(c, f) for c in (6, 10) for f in ("frechet", "median", "rms")]
    for ratio in found:
        values = {r.solver: getattr(r, ratio.figure).value for r in results if r.calls == ratio.calls}
        assert ratio.peer == min(peers, key=values.__getitem__)
        assert ratio.ratio.value == pytest.approx(values["variance_optimal"] / values[ratio.peer])
        assert ratio.ratio.low < ratio.ratio.value < ratio.ratio.high
    itself = list(ratios(problem(), results, tmp_path, "ddim", ["ddim"], resamples=5))
    assert all(tuple(r.ratio) == (1, 1, 1) for r in itself)  # the same rows of both
