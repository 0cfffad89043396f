"""Generation in processes of its own: killed, interrupted, on a full disk, on several devices and hosts; its memory."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from evodiff_jax import generation
from evodiff_jax.generation import _manifest, _place

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CODE = "from evodiff_jax.cli import main; raise SystemExit(main())"
BUSY = ("--model", "generation_models:busy", "--solver", "ddim", "--steps", "3", "--batch", "8")
FATAL = "Terminating process because the JAX distributed service detected fatal errors"


def start(place, *arguments, devices=1):
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    flags = [*os.environ.get("XLA_FLAGS", "").split(), f"--xla_force_host_platform_device_count={devices}"]
    environment["XLA_FLAGS"] = " ".join(flags)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-c", CODE, "generate", *BUSY, "--out", str(place), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def run(place, *arguments, devices=1):
    code, out, err = finish(start(place, *arguments, devices=devices))
    assert (code, err) == (0, "")
    return out


def markers(place):
    return set((place / "chunks").glob("*.json")) if place.exists() else set()


def wait_for_chunks(process, place, count):
    for _ in range(3000):
        if len(markers(place)) >= count or process.poll() is not None:
            return
        time.sleep(0.02)
    raise AssertionError("no chunk in a minute")


def contents(place):
    """All files of a place but locks of TensorStore's own, which a killed process leaves."""
    found = {path.relative_to(place): path for path in place.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.name.endswith("__lock")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """200 samples in 25 chunks, made by one process without trouble."""
    place = tmp_path_factory.mktemp("undisturbed") / "images"
    run(place, "--num", 200)
    return place


def test_killed_at_twenty_random_moments_it_makes_what_an_undisturbed_run_makes(tmp_path):
    num = 1200
    run(tmp_path / "undisturbed", "--num", num)
    place, draw, before = tmp_path / "images", random.Random(0), []
    for kill in range(20):
        process = start(place, "--num", num)
        if kill % 2:  # anywhere from the start on
            time.sleep(draw.uniform(0.5, 8))
        else:  # among the chunks
            wait_for_chunks(process, place, len(markers(place)) + 1)
            time.sleep(draw.uniform(0, 1))
        assert process.poll() is None
        process.kill()
        finish(process)
        before.append(len(markers(place)))
    assert len(set(before)) > 5
    assert before[-1] < num // 8
    assert f"before   {before[-1]:,} chunks complete, 0 damaged" in run(place, "--num", num)
    assert contents(place) == contents(tmp_path / "undisturbed")
    print("complete chunks at the kills:", before)


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_ctrl_c_and_sigterm_leave_complete_chunks_and_no_lock(undisturbed, tmp_path, number, code, word):
    place = tmp_path / "images"
    process = start(place, "--num", 200)
    wait_for_chunks(process, place, 3)
    process.send_signal(number)
    assert finish(process) == (code, "", f"evodiff-jax: {word}\n")
    assert 3 <= len(markers(place)) < 25
    assert not (place / "lock.json").exists()
    found = generation.verify(place)
    assert (found.intact, found.damaged) == (len(markers(place)), ())
    run(place, "--num", 200)
    assert contents(place) == contents(undisturbed)


def test_a_full_disk(undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this process may not mount a small disk")
    try:
        code, out, err = finish(start(disk / "images", "--num", 200))
        assert (code, out) == (2, "")
        assert err == f"evodiff-jax: error: [Errno 28] No space left on device: '{disk}/images'\n"
        found = generation.verify(disk / "images")
        assert 5 < found.intact < 25
        assert found.damaged == ()
        assert finish(start(disk / "images", "--num", 200))[0] == 2  # no better, and nothing is lost
        assert generation.verify(disk / "images").intact >= found.intact
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        run(disk / "images", "--num", 200)
        assert contents(disk / "images") == contents(undisturbed)
    finally:
        subprocess.run(["umount", disk], check=False)


def test_two_runs_at_once(undisturbed, tmp_path):
    place = tmp_path / "images"
    both = [start(place, "--num", 200) for _ in range(2)]
    codes, _, errors = zip(*map(finish, both), strict=True)
    assert sorted(codes) == [0, 2]
    (error,) = filter(None, errors)
    assert re.fullmatch(
        rf"evodiff-jax: error: '{place}' is being written to by process \d+ on \S+ since [^\n]*\n", error
    )
    assert contents(place) == contents(undisturbed)


# ---- devices and hosts


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """The same 200 samples on two devices, 8 at a time on each."""
    place = tmp_path_factory.mktemp("two_devices") / "images"
    run(place, "--num", 200, "--batch", 16, devices=2)
    return place


def assert_equal_but_for_round_off(place, other):
    here, there = (generation.open(path)[:].astype(int) for path in (place, other))
    different = here != there
    print(f"{different.mean():.1e} of the bytes differ, by {np.abs(here - there).max()} at most")
    assert np.abs(here - there).max() <= 1
    assert different.mean() < 1e-3


def test_devices(undisturbed, two_devices, tmp_path):
    """Two and eight: the same bytes. One: another program for XLA, and the same but for round-off."""
    place = tmp_path / "images"
    out = run(place, "--num", 200, "--batch", 64, devices=8)
    assert "device   8 x cpu" in out
    marker = json.loads((place / "chunks" / "00000000.json").read_text())
    assert (marker["images"], marker["batch"]) == (64, 8)
    np.testing.assert_array_equal(generation.open(place)[:], generation.open(two_devices)[:])
    assert_equal_but_for_round_off(place, undisturbed)


def test_another_batch_a_device_changes_round_off_only(undisturbed, tmp_path):
    run(tmp_path / "images", "--num", 200, "--batch", 24)
    assert_equal_but_for_round_off(tmp_path / "images", undisturbed)


def hosts(place, count, *arguments, timeout=10, devices=1, counts=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--coordinator", f"127.0.0.1:{port}", "--host-timeout", timeout]
    counts = counts or [count] * count
    return [
        start(place, *given, "--num-hosts", n, "--host", i, *arguments, devices=devices) for i, n in enumerate(counts)
    ]


@pytest.mark.parametrize(("count", "devices"), [(2, 1), (2, 2), (3, 1)])
def test_several_hosts_give_the_same_bytes(undisturbed, two_devices, tmp_path, count, devices):
    place = tmp_path / "images"
    batch = 8 * devices
    processes = hosts(place, count, "--num", 200, "--batch", batch, "--chunk", 16, devices=devices, timeout=60)
    results = [finish(process) for process in processes]
    assert [result[0] for result in results] == [0] * count, results
    assert f"on host 0 of {count}" in results[0][1]
    assert [out for _, out, _ in results[1:]] == [""] * (count - 1)
    alone = undisturbed if devices == 1 else two_devices
    np.testing.assert_array_equal(generation.open(place)[:], generation.open(alone)[:])


@pytest.mark.parametrize("dying", [0, 1])
def test_where_a_host_dies_the_other_stops_and_one_alone_completes_the_run(tmp_path, undisturbed, dying):
    place = tmp_path / "images"
    processes = hosts(place, 2, "--num", 2000)
    wait_for_chunks(processes[0], place, 4)
    processes[dying].kill()
    killed = time.monotonic()
    code, _, err = finish(processes[1 - dying], timeout=60)
    seconds = time.monotonic() - killed
    print(f"host {1 - dying} stopped with {code} after {seconds:.0f} s")
    assert code not in (0, None)
    assert FATAL in err or "the hosts lost each other" in err, err
    assert seconds < 40
    finish(processes[dying])
    found = generation.verify(place)
    assert 4 <= found.intact < 250
    assert found.damaged == ()
    out = run(place, "--num", 2000)
    assert f"before   {found.intact:,} chunks complete, 0 damaged" in out
    np.testing.assert_array_equal(generation.open(place)[:200], generation.open(undisturbed)[:])


@pytest.mark.parametrize("stopped", [0, 1])
def test_where_a_host_is_interrupted_the_other_ends_in_order(tmp_path, stopped):
    place = tmp_path / "images"
    processes = hosts(place, 2, "--num", 2000)
    wait_for_chunks(processes[0], place, 4)
    processes[stopped].send_signal(signal.SIGTERM)
    codes, _, errors = zip(*(finish(process, 60) for process in processes), strict=True)
    assert codes[stopped] == 143
    assert codes[1 - stopped] == 2
    assert f"evodiff-jax: error: host {stopped} stopped: Terminated" in errors[1 - stopped]
    assert generation.verify(place).damaged == ()


def test_hosts_that_were_given_different_counts_stop_before_they_write(tmp_path):
    processes = hosts(tmp_path / "images", 2, "--num", 200, counts=[2, 3])
    codes, _, errors = zip(*(finish(process, 60) for process in processes), strict=True)
    assert codes == (2, 2), errors
    assert errors[0] == "evodiff-jax: error: host 1 was started with --num-hosts 3, host 0 with 2\n"
    assert errors[1] == "evodiff-jax: error: host 0 was started with --num-hosts 2, host 1 with 3\n"
    assert not (tmp_path / "images").exists()


def test_where_a_host_does_not_come_jax_ends_the_others_before_they_write(tmp_path):
    processes = hosts(tmp_path / "images", 2, "--num", 200, counts=[3, 3])
    for process in processes:
        code, _, error = finish(process, 60)
        assert code != 0
        assert "DEADLINE_EXCEEDED" in error
    assert not (tmp_path / "images").exists()


def test_hosts_that_were_given_other_commands_stop_before_they_write(tmp_path):
    place = tmp_path / "images"
    processes = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given = ["--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--host-timeout", 10, "--num-hosts", 2]
    for host in range(2):
        processes.append(start(place, *given, "--num", 200, "--host", host, "--seed", host))
    codes, _, errors = zip(*(finish(process, 60) for process in processes), strict=True)
    assert codes == (2, 2), errors
    assert all("the hosts' commands differ (seed 0 on host 0, 1 on host 1)" in error for error in errors), errors
    assert not place.exists()


# ---- memory


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    code = """
        import resource, sys
        import generation_models as models
        import evodiff_jax as ed
        from evodiff_jax import generation

        plan = ed.plan(models.SCHEDULE, ed.grids.log_snr(models.SCHEDULE, 2), ed.solvers.ddim())
        generation.generate(models.pixels(), plan, sys.argv[1], int(sys.argv[2]), batch=100)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    code = "\n".join(line[8:] for line in code.splitlines())
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
    found = []
    for num in (1_000, 100_000):
        command = [sys.executable, "-c", code, str(tmp_path / str(num)), str(num)]
        found.append(int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout))
    print(f"{found[0] / 1024:.0f} MiB at 1,000 samples, {found[1] / 1024:.0f} MiB at 100,000")
    assert found[1] < found[0] + 20 * 1024
    assert generation.verify(tmp_path / "100000").intact == 1000


def test_a_complete_place_of_another_version_is_not_read(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "images")
    manifest = json.loads((tmp_path / "images" / "manifest.json").read_text())
    (tmp_path / "images" / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="was written by a later version"):
        _manifest.read_manifest(_place.Place(tmp_path / "images"))
