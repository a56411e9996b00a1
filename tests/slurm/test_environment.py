"""Jobs whose site file, interpreter or environment is broken; jobs without home and network."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from local_slurm import MISSING, ROOT, SMALL, Job, LocalSlurm, common, stand_in

READ_SITE = f"""
set -uo pipefail
source {ROOT}/slurm/common.sh
site=site.sh
read_site
echo read
echo $- $(set -o | grep pipefail)
"""


def read_site(folder, text):
    (folder / "nested.sh").write_text("false\ntrue\n")
    (folder / "site.sh").write_text(text)
    return subprocess.run(
        ["bash", "-c", READ_SITE],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "text",
    [
        "export CUDA_HOME=$CONDA_PREFIX/cuda",
        "if false; then :; fi\nfalse || true\n[ -d /nope ] && export X=1\n:",
        "load() { false; true; }\nload",
        "source nested.sh",
        "false | true",
        "set -e",
        "set +e +u; set -o pipefail",
    ],
)
def test_a_site_file_may_use_unset_variables_and_test_for_failures(tmp_path, text):
    done = read_site(tmp_path, text)
    assert (done.returncode, done.stderr) == (0, "")
    # The options of the job script are back.
    assert re.fullmatch(r"read\n[^e ]*u[^e ]* pipefail\s+on\n", done.stdout)


def test_a_site_file_may_leave_work_for_the_end_of_the_job(tmp_path):
    assert read_site(tmp_path, "trap 'echo cleaned' EXIT").stdout.endswith("on\ncleaned\n")


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("true\n  grep -q x /dev/null\ntrue", "line 2 failed with code 1: grep -q x /dev/null"),
        (
            "module() { return 4; }\nmodule load cuda/99\n:",
            "line 2 failed with code 4: module load cuda/99",
        ),
        ("modul load cuda/99\n:", "line 1 failed with code 127: modul load cuda/99"),
        ("source missing.sh\n:", "line 1 failed with code 1: source missing.sh"),
        ("cuda=$(false)\n:", "line 1 failed with code 1: cuda=$(false)"),
        ("set -e\nfalse\n:", "line 2 failed with code 1: false"),
        ("true\nfalse", "line 2 failed with code 1: false"),
        ("[ -d /nope ] && export X=1", "ended with code 1"),
        ("return 5", "ended with code 5"),
        ("exit 3", "ended with code 3"),
        ("exit 0", "ended with code 0"),
        (": ${CUDA_HOME:?load a module}", "ended with code 127"),
        ("if true; then\n", "ended with code [12]"),
    ],
)
def test_a_site_file_that_fails_ends_the_job(tmp_path, text, failure):
    done = read_site(tmp_path, text)
    assert done.returncode == 2
    pattern = failure if "[12]" in failure else re.escape(failure)
    assert re.fullmatch(
        rf"coda: site\.sh {pattern} \(where a failure does not matter: command \|\| true\)\n",
        done.stdout,
    )


@pytest.mark.parametrize("command", ["train", "prepare", "evaluate"])
def test_what_is_imported_before_the_processes_exists(tmp_path, command):
    importlib.import_module(common(f"imports {command}", tmp_path))


def submit_from(slurm, name, site):
    """A job of a project of its own, whose site file is ``site``; the folder of its logs."""
    folder = slurm.submit_folder / name
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    (folder / "slurm" / "clusters" / "local.sh").write_text(site)
    output = f"--output={slurm.submit_folder}/coda-%j.out"
    number = slurm.run(
        "env", "-C", str(folder), "sbatch", "--parsable", output, *SMALL, "slurm/imagenet_coda.sh"
    ).strip()
    job = Job(slurm, number)
    job.wait_for_end(60)
    return job, folder / "logs" / number / "0"


@pytest.mark.slurm
def test_a_job_whose_site_file_fails_says_so_and_ends(slurm):
    job, logs = submit_from(slurm, "site-fails", "module() { return 1; }\nmodule load cuda/99\n")
    assert (job.state, job.restarts) == ("FAILED", 0)
    assert job.log.startswith(
        "coda: slurm/clusters/local.sh line 2 failed with code 1: module load cuda/99 ("
    )
    assert job.log.count("\n") == 1
    assert not logs.exists()


APPTAINER = """#!/bin/sh
# As `apptainer exec --nv --bind FOLDER IMAGE COMMAND`, where the image is a folder.
[ "$1 $2 $3" = "exec --nv --bind" ] && [ -d "$4" ] || { echo "FATAL: usage" >&2; exit 255; }
image=$5 command=$6
shift 6
[ -x "$image$command" ] || { echo "FATAL: $command: no such file or directory" >&2; exit 255; }
exec "$image$command" "$@"
"""


@pytest.mark.slurm
@pytest.mark.parametrize("complete", [True, False])
def test_a_container_is_one_line_of_the_site_file(slurm, python, tmp_path, complete):
    stand_in(slurm, "contained", event="finished 0\n", seconds=0, code=0)
    inside = tmp_path / "coda.sif" / "opt" / "coda" / "bin" / "python"
    inside.parent.mkdir(parents=True)
    if complete:
        shutil.copy(slurm.environment.pop("CODA_PYTHON"), inside)
    else:
        del slurm.environment["CODA_PYTHON"]
    runtime = tmp_path / "apptainer"
    runtime.write_text(APPTAINER)
    runtime.chmod(0o755)
    line = f'container=({runtime} exec --nv --bind "$PWD" {tmp_path}/coda.sif)\n'
    job, logs = submit_from(slurm, f"container-{complete}", line)
    if complete:
        assert (job.state, job.restarts) == ("COMPLETED", 0), job.log
        assert "started as train imagenet_coda_resnet50" in (logs / "rank-1.log").read_text()
    else:
        assert (job.state, job.restarts) == ("FAILED", 0)
        said = (
            "coda.sif /opt/coda/bin/python cannot be started: "
            "FATAL: /opt/coda/bin/python: no such file or directory (all of it: "
        )
        assert said in job.log.splitlines()[-1]


BROKEN = """#!/bin/sh
# An interpreter whose torch misses a library, in processes that `broken` names.
if {broken}; then
    PYTHONPATH={folder}:$PYTHONPATH exec {python} "$@"
fi
{well}
"""


def broken_interpreter(slurm, folder, *, broken="true", well=""):
    (folder / "torch.py").write_text(
        'raise ImportError("libcudart.so.12: cannot open shared object file")\n'
    )
    program = folder / "python"
    program.write_text(
        BROKEN.format(broken=broken, folder=folder, python=sys.executable, well=well)
    )
    program.chmod(0o755)
    slurm.environment["CODA_PYTHON"] = str(program)


def ended_at_once(job):
    """The last line of a job that has found its environment broken."""
    job.wait_for_end(90)
    assert (job.state, job.restarts) == ("FAILED", 0), job.reports()
    begin, end, line = (line for line in job.log.splitlines() if not line.startswith("srun: "))
    assert "attempt 0 on" in begin
    assert end.endswith(": mistake")
    assert line.startswith("coda: ")
    return line


@pytest.mark.slurm
def test_a_job_that_cannot_import_says_so_and_ends(slurm, python, tmp_path):
    broken_interpreter(slurm, tmp_path)
    job = slurm.submit(*SMALL, "slurm/imagenet_coda.sh")
    line = ended_at_once(job)
    log = Path("logs") / job.number / "0" / "import.log"
    said = (
        "cannot import what `coda train` needs: "
        "ImportError: libcudart.so.12: cannot open shared object file"
    )
    assert f"{said} (all of it: {log}); `make setup`" in line
    assert "Traceback" in (slurm.submit_folder / log).read_text()
    # No process was started.
    assert not list((slurm.submit_folder / log).parent.glob("rank-*"))


@pytest.mark.slurm
def test_a_job_without_its_interpreter_says_so_and_ends(slurm, python):
    slurm.environment["CODA_PYTHON"] = "/opt/nowhere/python"
    line = ended_at_once(slurm.submit(*SMALL, "slurm/imagenet_coda.sh"))
    assert "/opt/nowhere/python: No such file or directory" in line
    assert "CODA_PYTHON=" in line
    assert "python= in slurm/clusters/local.sh" in line


@pytest.mark.slurm
def test_an_import_that_fails_on_another_node_is_not_tried_again(slurm, python, tmp_path):
    broken_interpreter(
        slurm,
        tmp_path,
        broken='[ "${SLURM_STEP_ID:-}${SLURM_PROCID:-}" = 01 ]',
        well="[ -z ${SLURM_STEP_ID:-} ] || sleep 100",
    )
    line = ended_at_once(slurm.submit(*SMALL, "slurm/imagenet_coda.sh"))
    assert "libcudart.so.12: cannot open shared object file" in line


@pytest.fixture(scope="module")
def remote():
    """A cluster whose nodes have a network that leads nowhere, and an empty, read-only home."""
    if (
        MISSING
        or os.geteuid() != 0
        or subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs root, namespaces, and apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="coda-"))
    home = folder / "home"
    home.mkdir()
    with LocalSlurm(folder, networks=True, read_only=home) as cluster:
        cluster.environment["HOME"] = str(home)
        yield cluster
    shutil.rmtree(folder)


@pytest.mark.slurm
def test_nodes_need_no_home_and_no_network(remote):
    probe = "! touch ~/file && ! ip route get 192.0.2.1"
    remote.run("srun", *SMALL, "sh", "-c", probe)
    folder = remote.submit_folder
    changes = [
        "name=small",
        f"runs={folder}/runs",
        f"data.prepared={folder}/data",
        "data.image_size=8",
        "model.name=coda_s",
        "model.args={rank: 2}",
        "training.epochs=1",
        "training.warmup_epochs=0",
        "training.global_batch_size=128",
        "evaluation.final_metrics=[accuracy]",
    ]
    job = remote.submit(*SMALL, "slurm/imagenet_coda.sh", "digits_coda_resnet20", *changes)
    job.wait_for_end(500)
    assert (job.state, job.restarts) == ("COMPLETED", 0), job.reports()
    assert job.log.endswith("attempt 0 ended with code 0: done\n")
    assert (folder / "runs" / "small" / "evaluation.json").is_file()


@pytest.mark.slurm
def test_an_interpreter_that_a_node_does_not_have_is_not_tried_again(remote, tmp_path):
    stand_in(remote, "elsewhere", event="", seconds=100, code=0)
    node = (remote.folder / "slurmd-n2.pid").read_text().strip()
    place = tmp_path / "node-local"
    place.mkdir()
    shutil.move(remote.environment["CODA_PYTHON"], place / "python")
    remote.environment["CODA_PYTHON"] = str(place / "python")
    remote.run("nsenter", "--target", node, "--mount", "mount", "-t", "tmpfs", "tmpfs", str(place))
    line = ended_at_once(remote.submit(*SMALL, "slurm/imagenet_coda.sh"))
    said = f"slurmstepd-n2: error: execve(): {place}/python: No such file or directory"
    assert f"{said}; name the interpreter by CODA_PYTHON=" in line
