"""Two virtual SLURM nodes on loopback, in a private folder."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.launch.shell import environment, need, run, wait_for

_CONF = """ClusterName=v3jax-test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
SlurmctldPort={ports[0]}
FirstJobId={first}
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=p Nodes=n1,n2 Default=YES MaxTime=INFINITE OverTimeLimit=0 State=UP
"""


class Cluster:
    """Its folder, and the environment its clients need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = environment(SLURM_CONF=folder / "slurm.conf")

    def call(self, *command: object, **variables: object) -> str:
        """Output of a client program."""
        env = self.env | {name: str(value) for name, value in variables.items()}
        done = run(*command, env=env)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """A job's state, COMPLETED and the like."""
        words = self.call("scontrol", "show", "job", job).split()
        return next(w for w in words if w.startswith("JobState=")).removeprefix("JobState=")


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A running cluster; only the processes started here are ended, by their ids."""
    need(sbatch="slurm-wlm", slurmctld="slurm-wlm", slurmd="slurm-wlm", munged="munge")
    folder = Path(tempfile.mkdtemp(prefix="v3slurm-"))  # short: a socket's path has 107 characters
    host = socket.gethostname().split(".")[0]
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    conf = _CONF.format(
        folder=folder,
        host=host,
        user=getpass.getuser(),
        ports=_free_ports(3),
        first=100 + os.getpid() % 3900,  # the coordinator's port follows from it
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(conf)
    here = Cluster(folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        socket_file = folder / "munge.socket"
        _daemon(
            stack,
            here,
            "munged",
            *("--foreground", "--force", f"--key-file={key}", f"--socket={socket_file}"),
            *(f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"),
            f"--log-file={folder}/munged.log",
        )
        wait_for("munged", socket_file.exists, 20)
        _daemon(stack, here, "slurmctld", "-D")
        for node in ("n1", "n2"):
            _daemon(stack, here, "slurmd", "-D", "-N", node)
        wait_for("two idle nodes", lambda: _idle(here) == 2, 60)
        stack.callback(_end_jobs, here)
        yield here


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        open_now = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in open_now:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in open_now]


def _daemon(stack: ExitStack, here: Cluster, program: str, *arguments: str) -> None:
    log = stack.enter_context((here.folder / f"{program}{len(arguments)}.out").open("ab"))
    process = subprocess.Popen([program, *arguments], env=here.env, stdout=log, stderr=log)
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)


def _idle(here: Cluster) -> int:
    done = run("sinfo", "--noheader", "--Node", "--format=%T", env=here.env)
    return done.stdout.split().count("idle")


def _end_jobs(here: Cluster) -> None:
    """Cancels what still runs and waits for it: a daemon that ends leaves its job steps behind."""
    jobs = here.call("squeue", "--noheader", "--format=%i").split()
    if jobs:
        here.call("scancel", *jobs)
        wait_for("cancelled jobs", lambda: _idle(here) == 2, 60)
