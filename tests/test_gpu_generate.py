"""launch/gpu_generate.sh against a real sshd: nothing is lost, redone or half there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from gpu_host import Job, Server, wait_for

pytest_plugins = ["gpu_fixtures"]
pytestmark = pytest.mark.slow


def test_the_whole_path_and_a_second_run_sends_nothing(job: Job) -> None:
    job.control(prints=2_500_000)
    result = job.run()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("x") == 2_500_000
    job.check_complete()
    assert job.sampled() == list(range(job.count))
    assert "block 5 of 6" in result.stdout
    (start,) = job.lines("starts")
    assert f"{job.host}/code/" in start, "the code that was sent is the code that runs"
    assert start.endswith("### User: $(false) 'quoted'")
    assert len(job.models()) == 1 and re.fullmatch("[0-9a-f]{64}", job.models()[0])
    assert list((job.host / "incoming").iterdir()) == []

    sent = [path for kind in ("models", "questions", "code") for path in job.host.glob(f"{kind}/*")]
    times = [path.stat().st_ctime_ns for path in sent]
    shutil.rmtree(job.out)
    again = job.run()
    assert again.returncode == 0, again.stderr
    job.check_complete()
    assert "sending" not in again.stderr and len(job.lines("starts")) == 1
    assert [path.stat().st_ctime_ns for path in sent] == times

    job.out = job.here / "out 2"
    other = job.run()
    assert other.returncode == 0, other.stderr
    job.check_complete()
    assert "sending models" not in other.stderr and len(job.lines("starts")) == 2


def test_a_cut_connection_is_made_again_and_no_block_is_sampled_twice(job: Job) -> None:
    process = job.start_and_wait_at(3)
    assert job.server.cut() > 0
    job.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "lost the connection to 127.0.0.1" in errors
    job.check_complete()
    assert job.sampled() == list(range(job.count)) and len(job.lines("starts")) == 1


def test_a_connection_lost_for_good_leaves_the_job_running(job: Job) -> None:
    job.options += ["--retries", "0"]
    process = job.start_and_wait_at(3)
    job.server.cut()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 255 and "the same command picks it up" in errors
    assert job.is_running()
    assert not (job.out / "completions.jsonl").exists()
    job.control()
    result = job.run()
    assert result.returncode == 0, result.stderr
    job.check_complete()
    assert job.sampled() == list(range(job.count)) and len(job.lines("starts")) == 1


def test_after_kill_9_here_the_same_command_follows_the_job(job: Job) -> None:
    process = job.start_and_wait_at(3)
    process.kill()
    process.communicate(timeout=10)  # returns: nothing that it started keeps the pipes open
    assert job.is_running()
    process = job.start()
    assert process.stderr is not None
    assert "the job runs already" in process.stderr.readline()
    job.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    job.check_complete()
    assert job.sampled() == list(range(job.count)) and len(job.lines("starts")) == 1


def test_two_calls_for_one_out_take_turns(job: Job) -> None:
    first = job.start_and_wait_at(3)
    second = job.start()
    time.sleep(2)  # a second that came too late would prove nothing, not fail
    job.control()
    assert first.wait(timeout=60) == 0
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0 and "finished before" in errors, errors
    first.communicate()
    job.check_complete()


def test_a_host_that_lost_everything_gets_the_blocks_that_are_here(job: Job) -> None:
    process = job.start_and_wait_at(3)
    wait_for(lambda: len(job.blocks_here()) == 3, "the blocks here")
    process.kill()
    process.communicate(timeout=10)
    job.kill_on_host()
    for name in ("models", "questions", "code", "runs"):
        shutil.rmtree(job.host / name)
    (job.host / "sampled").unlink()
    job.control()
    result = job.run()
    assert result.returncode == 0, result.stderr
    job.check_complete()
    assert job.sampled() == list(range(3, job.count))


def test_a_job_killed_on_the_host_is_started_again(job: Job) -> None:
    process = job.start_and_wait_at(3)
    job.kill_on_host()
    job.control()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "starting it again" in errors and len(job.lines("starts")) == 2
    job.check_complete()
    assert job.sampled() == list(range(job.count))


def test_a_failing_worker_gives_its_exit_code_and_its_last_words(job: Job) -> None:
    job.control(fails_at=3)
    result = job.run()
    assert result.returncode == 7
    tail = result.stderr[result.stderr.index("failed with exit code 7") :]
    assert tail.endswith("block 2 of 6\nout of memory at question 3\n")
    assert len(job.blocks_here()) == 3 and not (job.out / "completions.jsonl").exists()
    engine = (job.host / "engine").read_text()
    wait_for(lambda: not Path(f"/proc/{engine}").exists(), "the end of what the worker left")
    job.control()
    assert job.run().returncode == 0
    job.check_complete()
    assert job.sampled() == list(range(job.count))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_here_stops_the_job_there(job: Job, number: signal.Signals) -> None:
    process = job.start_and_wait_at(3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "stopping the job on 127.0.0.1" in errors and "stopped; the same command" in errors
    assert not job.is_running()
    assert (job.jobs()[0] / "exit").read_text() == "143\n"


def test_ctrl_c_of_a_recipe_stops_the_job_there_too(job: Job) -> None:
    """Ctrl-C reaches both; the recipe ends first and kills the script before it has stopped it."""
    source = (
        "import sys; from pathlib import Path; from memphis_jax.rounds import ledger as l\n"
        "folder, at = Path(sys.argv[1]), sys.argv.index('--') + 1\n"
        "stage = l.Stage('s', tuple(sys.argv[at:]), (), (), tuple(sys.argv[2:at]))\n"
        "l.Ledger(folder, '').run(stage)"
    )
    job.control(waits_at=1)
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(job.here), *job.prefix, *job.command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for(job.sampled, "the first block")
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=10)
    wait_for(lambda: (job.jobs()[0] / "exit").exists(), "the end of the job")
    assert not job.is_running()
    assert (job.jobs()[0] / "exit").read_text() == "143\n"  # stopped, not killed


@pytest.mark.parametrize("how", ["cut", "kill -9"])
def test_a_model_cut_in_transfer_never_appears_in_place(job: Job, how: str) -> None:
    size = 200_000_000
    with (job.model / "weights").open("r+b") as file:
        file.truncate(size)
    process = job.start()
    incoming = job.host / "incoming"
    wait_for(lambda: [p for p in incoming.glob("weights.*") if p.stat().st_size > 0], "weights")
    if how == "cut":
        assert job.server.cut() > 0
    else:
        process.kill()
        process.communicate(timeout=10)
    wait_for(lambda: [*incoming.glob("*/weights")], "the part that is kept")
    assert all(name.endswith(".partial") for name in job.models())
    if how == "kill -9":
        process = job.start()

    def in_place() -> bool:
        whole = [path for path in job.host.glob("models/*") if path.suffix != ".partial"]
        assert all((path / "weights").stat().st_size == size for path in whole)
        return bool(whole)

    wait_for(in_place, "the model in place")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert how != "cut" or "lost the connection" in errors
    job.check_complete()
    (folder,) = job.host.glob("models/*")
    assert sorted(path.name for path in folder.iterdir()) == ["conversion.json", "weights"]
    assert list(incoming.iterdir()) == []


def test_another_command_for_the_same_out_is_refused_while_a_job_runs(job: Job) -> None:
    process = job.start_and_wait_at(3)
    process.kill()
    process.communicate(timeout=10)
    job.questions[1].write_text('{"id": "new", "prompt": "p"}\n')
    result = job.run()
    assert result.returncode == 1
    assert re.search(r"another command's job .* still runs there; .*kill -- -\d+$", result.stderr)
    job.kill_on_host()


def test_through_a_bucket_without_rsync_on_either_side(tmp_path: Path, bare_server: Server) -> None:
    job = Job(tmp_path, bare_server, environment={"PATH": bare_server.path})
    programs = Path(bare_server.path)
    job.options += ["--bucket", "gs://bucket/some folder/"]
    (job.model / "weights").rename(job.here / "blob")
    (job.model / "weights").symlink_to(job.here / "blob")  # as in a Hugging Face cache
    hold = programs / "hold"
    hold.touch()
    process = job.start()
    wait_for(hold.read_text, "gcloud")
    process.kill()
    process.communicate(timeout=10)
    wait_for(lambda: not Path(f"/proc/{hold.read_text()}").exists(), "the end of gcloud")
    hold.unlink()

    process = job.start_and_wait_at(3)
    wait_for(lambda: len(job.blocks_here()) == 3, "the blocks here")
    process.kill()
    process.communicate(timeout=10)
    job.kill_on_host()
    shutil.rmtree(job.host / "runs")
    shutil.rmtree(programs / "gs/bucket/some folder/runs")
    (job.host / "sampled").unlink()
    job.control()
    result = job.run()
    assert result.returncode == 0, result.stderr
    job.check_complete()
    assert job.sampled() == list(range(3, job.count))
    assert not list(job.host.glob("*/*.partial"))
    log = programs / "gcloud.log"
    before = len(log.read_text())
    assert job.run().returncode == 0
    assert "/models/" not in log.read_text()[before:]


def test_a_full_disk_here_is_said_and_the_job_goes_on(job: Job) -> None:
    job.out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(job.out)]
    if subprocess.run(mount, capture_output=True).returncode:
        told = "needs the right to mount a tmpfs"
        pytest.fail(told) if os.environ.get("MEMPHIS_CI") else pytest.skip(told)
    try:
        (job.out / "filler").write_bytes(bytes(60_000))
        job.control(waits_at=5)
        _, errors = job.start().communicate(timeout=60)
        assert errors.splitlines()[-1].startswith("gpu_generate.sh: disk full: rsync:")
        assert job.is_running()
        (job.out / "filler").unlink()
        job.control()
        result = job.run()
        assert result.returncode == 0, result.stderr
        job.check_complete()
        assert job.sampled() == list(range(job.count))
    finally:
        subprocess.run(["umount", str(job.out)], check=True)
