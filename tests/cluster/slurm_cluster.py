"""A real Slurm cluster of virtual nodes on this machine, for as long as the tests run. Needs root, and Slurm installed.

Partition `main`; partition `urgent` pushes its jobs out and back into the queue. Everything lies in one folder, except
the nodes' names in /etc/hosts, which are taken out again. The daemons end with the process that started them, however
it ends, so several clusters may be there at a time and none is left behind.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
AuthInfo=cred_expire=5,socket={folder}/munge.socket
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

    def __init__(self, folder: Path, num_nodes: int = 2, cpus_per_node: int = 2) -> None:
        self.folder = folder
        self.nodes = [f"node{i + 1}" for i in range(num_nodes)]
        self.cpus_per_node = cpus_per_node
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
        port, *ports = _free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={its} CPUs={self.cpus_per_node} "
            "RealMemory=8192 State=UNKNOWN"
            for node, its in zip(self.nodes, ports, strict=True)
        ]
        conf = CONF.format(host=host, port=port, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(conf)
        self._start_munge()
        (self.folder / "state").mkdir(exist_ok=True)
        self._daemon("slurmctld", "-D")
        self.wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False) or None, "slurmctld", 60)
        for node in self.nodes:
            (self.folder / f"spool-{node}").mkdir(exist_ok=True)
            self._daemon("slurmd", "-D", "-N", node)
        idle = ("sinfo", "--noheader", "-N", "--states=idle", "--format=%N")
        self.wait_until(lambda: set(self.run(*idle).split()) == set(self.nodes) or None, "the nodes", 60)

    def _start_munge(self) -> None:
        """One of our own, beside the machine's, if it has one."""
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon(
            "munged",
            "--foreground",
            "--force",  # pytest's folders are not open to all, as it would have its socket's
            *(f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")),
            f"--seed-file={self.folder}/munge.seed",
        )
        ask = ("munge", "--no-input", f"--socket={self.folder}/munge.socket")
        self.wait_until(
            lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0 or None, "munge", 60
        )

    def _daemon(self, *command: str) -> None:
        # Out of reach of Ctrl-C, or the jobs could not be taken out of the queue any more.
        with (self.folder / f"{command[0]}-{len(self._daemons)}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    ("setpriv", "--pdeathsig=TERM", *command),
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _name_nodes(self, *, add: bool) -> None:
        """Lightning takes the address of the first process from the list of nodes, so their names must resolve."""
        hosts, mark = Path("/etc/hosts"), "# fmcib_ssl tests, process "
        lines = []
        for line in hosts.read_text().splitlines():
            _, ours, process = line.partition(mark)
            if not ours or (process != str(os.getpid()) and Path("/proc", process).exists()):
                lines.append(line)
        if add:
            names = (socket.gethostname().split(".")[0], *self.nodes)
            lines += [f"127.0.0.1 {name} {mark}{os.getpid()}" for name in names]
        hosts.write_text("\n".join(lines) + "\n")

    def _logs(self) -> str:
        tails = (
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )
        return "\n".join(tails)


def _free_ports(number: int) -> list[int]:
    """Below those that the kernel gives away by itself."""
    found: list[int] = []
    for port in range(16900 + os.getpid() % 1000 * 8, 2**15):
        with socket.socket() as its, suppress(OSError):
            its.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == number:
            break
    return found
