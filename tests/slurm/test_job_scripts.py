"""The job scripts: their decisions, by a table, and what Slurm does with them, on a cluster."""

import re
import shutil
import subprocess

import pytest
from local_slurm import ROOT, SMALL, Job, common, job_of, stand_in

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def attempts(folder, *events):
    """Make the folders of attempts 0, 1, ... with the events that their first process reported.

    The word "preempted" is the script's own mark.
    """
    for number, text in enumerate(events):
        (folder / str(number)).mkdir()
        (folder / str(number) / "events-0").write_text(
            "".join(f"{event}\n" for event in text.split(", ") if event != "preempted")
        )
        if "preempted" in text:
            (folder / str(number) / "preempted").touch()


@pytest.mark.parametrize(
    ("events", "count"),
    [
        (["saved 4"], 0),
        ([""], 1),
        (["resumed 0", "stopped 0"], 2),
        (["saved 4", "resumed 4", "resumed 4, saved 4"], 2),
        (["saved 4", "resumed 4", "resumed 4, saved 9"], 0),
        (["saved 9", "preempted", "preempted", "preempted"], 0),
        (["saved 9", "preempted", "", "preempted", ""], 2),
        # In the order of numbers, not of names.
        ([""] * 10 + ["saved 2"] + [""], 1),
    ],
)
def test_attempts_without_fruit_are_counted(tmp_path, events, count):
    attempts(tmp_path, *events)
    assert common(f"fruitless {tmp_path}", tmp_path) == str(count)


@pytest.mark.parametrize(
    ("code", "state", "events", "expected"),
    [
        (0, "RUNNING", ["saved 9, finished 0"], "done"),
        (143, "RUNNING", ["", "", "", "finished 0"], "done"),
        # srun's code when it has lost a slurmstepd.
        (0, "RUNNING", ["saved 9"], "requeue"),
        (85, "RUNNING", ["saved 9, stopped 0"], "requeue"),
        # srun's code after a preemption.
        (143, "RUNNING", ["saved 9, stopped 0"], "requeue"),
        (137, "RUNNING", ["saved 9"], "requeue"),
        (85, "COMPLETING", ["saved 9, stopped 0"], "cancelled"),
        (2, "RUNNING", [""], "mistake"),
        # The other processes were terminated.
        (143, "RUNNING", ["resumed 3, mistake 0"], "mistake"),
        (126, "RUNNING", [""], "mistake"),
        (127, "RUNNING", ["saved 3"], "mistake"),
        (1, "RUNNING", ["", ""], "requeue"),
        (1, "RUNNING", ["", "", ""], "stuck"),
        (85, "RUNNING", ["saved 1", "saved 2", "saved 3", "saved 4"], "enough"),
    ],
)
def test_verdicts(tmp_path, code, state, events, expected):
    attempts(tmp_path, *events)
    call = f"verdict {code} {state} {tmp_path} {len(events) - 1}"
    assert common(call, tmp_path, CODA_MAX_RESTARTS="3") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slurmstepd-n2: error: execve(): bin/py: No such file or directory", "mistake"),
        ("slurmstepd: error: execve(): /home/x/py: Permission denied", "mistake"),
        # It may be there again at the next attempt.
        ("slurmstepd: error: execve(): /home/x/py: Stale file handle", "requeue"),
        ("/opt/python: No module named pipeline", "mistake"),
        ("KeyError: 'execve(): x: No such file or directory'", "requeue"),
    ],
)
def test_a_program_that_a_node_does_not_have_is_a_mistake(tmp_path, line, expected):
    attempts(tmp_path, "", "")
    (tmp_path / "1" / "rank-0.log").write_text(
        "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED ***\n"
    )
    (tmp_path / "1" / "rank-1.log").write_text(f"{line}\n")
    assert common(f"verdict 143 RUNNING {tmp_path} 1", tmp_path) == expected


def test_a_sweep_has_every_combination_once(tmp_path):
    axes = "model.args.temperature=10,100,1000 model.args.conv_stages=2,3"
    assert common(f"combinations {axes}", tmp_path) == "6"
    found = [common(f"combination {index} {axes}", tmp_path) for index in range(6)]
    assert found == [
        f"model.args.temperature={t} model.args.conv_stages={c}"
        for t in (10, 100, 1000)
        for c in (2, 3)
    ]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="apt-get install shellcheck")
def test_shellcheck_is_content():
    files = [
        *SCRIPTS,
        *(ROOT / "slurm" / "clusters").glob("*.sh"),
        *(ROOT / "install").glob("*.sh"),
        ROOT / ".ci" / "run",
    ]
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slurm
@pytest.mark.parametrize(
    "script",
    [
        path.name
        for path in SCRIPTS
        if path.name not in ("common.sh", "local_cluster.sh", "sweep.sh")
    ],
)
def test_requests_are_accepted_as_they_are(slurm, script):
    slurm.run("sbatch", "--test-only", f"slurm/{script}")


@pytest.mark.slurm
def test_a_cancelled_job_stays_cancelled(slurm, python):
    job = job_of(slurm, "sleeper", event="saved 3\n", seconds=100, code=0)
    job.wait(
        lambda: (slurm.submit_folder / "logs" / job.number / "0" / "events-0").exists(), "a start"
    )
    slurm.run("scancel", job.number)
    job.wait_for_end(60)
    assert (job.state, job.restarts) == ("CANCELLED", 0)


@pytest.mark.slurm
def test_a_mistake_is_said_once_and_not_repeated(slurm, python):
    job = job_of(slurm, "mistaken", event="mistake 0\n", seconds=0, code=2)
    job.wait_for_end(60)
    assert (job.state, job.restarts) == ("FAILED", 0)
    # A code above 2: the other process was terminated.
    assert re.search(r"ended with code (2|85|143): mistake\ncoda: what is wrong\n$", job.log)


@pytest.mark.slurm
@pytest.mark.parametrize("script", ["prepare_data.sh", "evaluate.sh"])
def test_other_jobs_say_how_they_ended(slurm, python, script):
    stand_in(slurm, "wrong", event="", seconds=0, code=2)
    job = slurm.submit(
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        f"slurm/{script}",
        "recipes/tiny.yaml",
    )
    job.wait_for_end(60)
    assert job.state == "FAILED"
    assert job.log.endswith("ended with code 2\ncoda: what is wrong\n")


@pytest.mark.slurm
def test_a_sweep_is_one_array_whose_elements_are_requeued_alone(slurm, python):
    stand_in(
        slurm, "swept", fails_first="model.args.rank=3", event="finished 0\n", seconds=0, code=0
    )
    said = slurm.run("slurm/sweep.sh", "recipes/tiny.yaml", "model.args.rank=2,3", "--", *SMALL)
    number = re.search(r"Submitted batch job (\d+)", said)[1]
    elements = [Job(slurm, f"{number}_{index}") for index in range(2)]
    for element in elements:
        element.wait_for_end(60)
    assert [(element.state, element.restarts) for element in elements] == [
        ("COMPLETED", 0),
        ("COMPLETED", 1),
    ]
    # Slurm gives one element, the last, the number of the whole array.
    assert elements[1].field("JobId") == number
    for element, rank in zip(elements, (2, 3), strict=True):
        log = (
            slurm.submit_folder
            / "logs"
            / element.field("JobId")
            / str(element.restarts)
            / "rank-0.log"
        )
        said = (
            f"started as train recipes/tiny.yaml model.args.rank={rank} name=tiny-{rank} "
            "tracking.experiment=tiny-sweep"
        )
        assert log.read_text().startswith(said)
