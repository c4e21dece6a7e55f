"""A real Slurm cluster of virtual nodes on this machine, for as long as the tests run. Needs root, and Slurm installed.

Partition `main`; partition `urgent` pushes its jobs out and back into the queue. Everything lies in one folder, except
munge's key and the nodes' names in /etc/hosts, which are taken out again.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DAEMONS = ("slurmctld", "slurmd", "munged")

#: A cluster needs no cgroups, no systemd and no accounting to queue, signal, preempt and requeue.
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=15
MinJobAge=600
UnkillableStepTimeout=60
InactiveLimit=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(RuntimeError):
    """The cluster, or a job on it, did not do what was waited for; the message has the logs."""


class SlurmCluster:
    """Starts on entry, stops on exit.

    Args:
        folder: for state and logs; made if it is not there.
        num_nodes: virtual nodes, `node1` and so on.
        cpus_per_node: may be more than the machine has.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, cpus_per_node: int = 2, port: int = 16917) -> None:
        self.folder = folder
        self.nodes = [f"node{i + 1}" for i in range(num_nodes)]
        self.cpus_per_node = cpus_per_node
        self.port = port
        self.environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def why_not() -> str | None:
        """What is missing on this machine, if something is."""
        if os.geteuid() != 0:
            return "a Slurm cluster of one's own needs root"
        if missing := [name for name in DAEMONS if shutil.which(name) is None]:
            return f"there is no {missing[0]} here; `make test-cluster` installs Debian's Slurm"
        return None

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._name_nodes(add=False)

    def run(self, *command: str, check: bool = True, **environ: str) -> str:
        """Run one of Slurm's commands and give what it prints."""
        done = subprocess.run(
            command, env={**self.environ, **environ}, capture_output=True, text=True, check=False, timeout=600
        )
        if check and done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr or done.stdout}")
        return done.stdout.strip()

    def submit(self, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
        """`sbatch`, and the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, **(environ or {})).split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job, such as `JobState`, `Restarts`, `ExitCode`."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, states: Iterable[str], timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        wanted = set(states)
        return self.wait_until(
            lambda: job if (job := self.job(number)).get("JobState") in wanted else None,
            f"job {number} in {' or '.join(sorted(wanted))}, it is {self.job(number).get('JobState')}",
            timeout_s,
        )

    def wait_until(self, found: Callable[[], T | None], what: str, timeout_s: float = 120) -> T:
        """Wait until something is there."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if (value := found()) is not None:
                return value
            time.sleep(0.2)
        raise ClusterError(
            f"waited {timeout_s:g} s in vain for {what}\n{self.run('squeue', check=False)}\n{self._logs()}"
        )

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        self._name_nodes(add=True)
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + i} CPUs={self.cpus_per_node} "
            "RealMemory=8192 State=UNKNOWN"
            for i, node in enumerate(self.nodes, 1)
        ]
        conf = CONF.format(host=host, port=self.port, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(conf)
        self._start_munge()
        (self.folder / "state").mkdir(exist_ok=True)
        self._daemon("slurmctld", "-D")
        self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False) or None, "slurmctld", 30)
        for node in self.nodes:
            (self.folder / f"spool-{node}").mkdir(exist_ok=True)
            self._daemon("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "-N", "--states=idle", "--format=%N")
        self.wait_until(lambda: set(self.run(*idle).split()) == set(self.nodes) or None, "the nodes", 30)

    def _start_munge(self) -> None:
        if _munge_answers():
            return  # one of the machine's own
        as_munge = ("setpriv", "--reuid=munge", "--regid=munge", "--clear-groups")
        for folder, mode in {
            "/run/munge": "755",
            "/var/log/munge": "700",
            "/var/lib/munge": "700",
            "/etc/munge": "700",
        }.items():
            self.run("install", "-d", "-o", "munge", "-g", "munge", "-m", mode, folder)
        if not Path("/etc/munge/munge.key").exists():
            self.run(*as_munge, "mungekey", "--create")
        self._daemon(*as_munge, "munged", "--foreground")
        self.wait_until(
            lambda: subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0 or None,
            "munge",
            20,
        )

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        self._daemons.append(
            subprocess.Popen(
                command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        )

    def _name_nodes(self, *, add: bool) -> None:
        """Lightning takes the address of the first process from the list of nodes, so their names must resolve."""
        hosts = Path("/etc/hosts")
        lines = [line for line in hosts.read_text().splitlines() if not line.endswith(" # fmcib_ssl tests")]
        if add:
            lines += [
                f"127.0.0.1 {name} # fmcib_ssl tests" for name in (socket.gethostname().split(".")[0], *self.nodes)
            ]
        hosts.write_text("\n".join(lines) + "\n")

    def _logs(self) -> str:
        tails = (
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )
        return "\n".join(tails)


def _munge_answers() -> bool:
    return subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0
