"""A SLURM cluster on this machine: four hosts with a network of their own, a slurmctld and a slurmd on each host.

The hosts are those of ``benchmarks/network/hosts.sh``. All of their processes, SLURM's daemons included, are in one
process namespace, which ends with this process however that ends: no daemon, job, interface or /dev/shm survives it.
Every socket is inside the hosts' networks or in the cluster's folder.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.launching import ROOT, environment

HOSTS = ROOT / "benchmarks" / "network" / "hosts.sh"
AGENT = ROOT / "benchmarks" / "network" / "agent.sh"
N_HOSTS = 4
TOOLS = ("ip", "tc", "unshare", "nsenter", "slurmctld", "slurmd", "munged", "sbatch", "srun")
DEBIAN_MPIRUN = Path("/usr/bin/mpirun.openmpi")
HOW_TO_GET_THEM = "make cluster-setup"

# cred_expire: a requeued job waits for it. KillWait: the time that ranks have to save after TERM.
# CgroupPlugin=cgroup/v1 works with any cgroup mount and with none. Weight: a job that may choose its nodes takes host4.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost=host1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/%n/slurm
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,preempt_strict_order
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=20
MinJobAge=300
SlurmdParameters=config_overrides
NodeName=host[1-3] CPUs=8 RealMemory=4000 Weight=2 State=UNKNOWN
NodeName=host4 CPUs=8 RealMemory=4000 Weight=1 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


@functools.cache
def missing() -> str | None:
    """Return why no cluster can be booted here, or None."""
    if os.geteuid() != 0:
        return "it needs root"
    absent = [name for name in TOOLS if shutil.which(name) is None] + ["Open MPI 4"] * (not DEBIAN_MPIRUN.exists())
    if absent:
        return f"no {', '.join(absent)} here: {HOW_TO_GET_THEM}"
    namespaces = ["unshare", "--net", "--pid", "--fork", "--mount", "true"]
    if subprocess.run(namespaces, capture_output=True, check=False).returncode:
        return "this machine permits no namespaces"
    return None


@dataclass(frozen=True)
class Job:
    """A job of SLURM, as ``scontrol show job`` describes it."""

    number: int
    state: str
    restarts: int
    facts: Mapping[str, str]


class Cluster:
    """A booted cluster. All paths are those of this machine: the hosts share its files, but not /dev/shm.

    Args:
        folder: A short path; the cluster's own.
        env: The environment of commands: it finds the hosts and SLURM.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self._env = folder, env

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on a host."""
        return [str(HOSTS), "enter", host, *command]

    def environment(self, mpi: str = "openmpi", **variables: str) -> dict[str, str]:
        """Return the environment of a user of `mpi` ("debian": Open MPI 4.1 of the system), with `variables`."""
        if mpi == "debian":
            found = environment("openmpi")
            found |= {"MPI4PY_LIBMPI": "/usr/lib/x86_64-linux-gnu/libmpi.so.40"}
        else:
            found = environment(mpi)
        found |= {name: self._env[name] for name in ("HOSTS_DIR", "SLURM_CONF")}
        # The hosts are on one machine: a rank that waits must leave the core to the others.
        found |= {"OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_hwloc_base_binding_policy": "none"}
        found |= {"PRTE_MCA_hwloc_default_binding_policy": "none"}
        found |= {f"{name}_ALLOW_RUN_AS_ROOT{last}": "1" for name in ("OMPI", "PRTE") for last in ("", "_CONFIRM")}
        return found | variables

    def run(
        self,
        command: Sequence[str],
        *,
        host: str = "host1",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        seconds: float = 180.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host and return what it printed, stdout and stderr in one."""
        return subprocess.run(
            ["timeout", "--kill-after=5", str(seconds), *self.command(host, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env or self.environment()),
            cwd=cwd or self.folder,
            text=True,
            errors="replace",
            check=False,
        )

    def check(self, command: Sequence[str], **options: object) -> str:
        """Run a command that must succeed; return what it printed."""
        done = self.run(command, **options)  # type: ignore[arg-type]
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} returned {done.returncode}:\n{done.stdout}")
        return done.stdout

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path) -> int:
        """Submit a batch script by sbatch; return the number of the job."""
        return int(self.check(["sbatch", "--parsable", *arguments], env=env, cwd=cwd).split(";")[0])

    def job(self, number: int) -> Job:
        """Return the state of a job."""
        text = self.check(["scontrol", "show", "job", "-o", str(number)])
        facts = dict(word.split("=", 1) for word in text.split() if "=" in word)
        return Job(number, facts["JobState"], int(facts.get("Restarts", "0")), facts)

    def hosts_of(self, number: int) -> list[str]:
        """Return the hosts that a job has, or had at its end."""
        return self.check(["scontrol", "show", "hostnames", self.job(number).facts["NodeList"]]).split()

    def wait_for(self, number: int, *states: str, seconds: float = 240.0) -> Job:
        """Wait until a job is in one of these states (default: it has ended); return it."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job = self.job(number)
            if job.state in (states or ends):
                return job
            time.sleep(0.2)
        queue = self.run(["squeue"]).stdout + self.run(["sinfo"]).stdout
        raise TimeoutError(f"job {number} is {job.state} after {seconds:g} s\n{queue}\n{self.log()}")

    def is_completing(self, number: int) -> bool:
        """Return whether processes of a job that has ended are still running."""
        return bool(self.check(["squeue", "-h", "-j", str(number), "-t", "COMPLETING"]).strip())

    def output(self, number: int) -> str:
        """Return what a job has printed so far."""
        path = Path(self.job(number).facts["StdOut"])
        return path.read_text(errors="replace") if path.exists() else "(no output)"

    def log(self) -> str:
        """Return the end of slurmctld's log."""
        return "\n".join((self.folder / "log" / "slurmctld.log").read_text().splitlines()[-30:])

    def processes_of(self, host: str) -> list[int]:
        """Return the processes of a host but its first, by their numbers on this machine."""
        names = ("net", "uts")
        first = _outer_pid(self.folder, host)
        here = [os.readlink(f"/proc/{first}/ns/{name}") for name in names]
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and [os.readlink(entry / "ns" / name) for name in names] == here:
                    found.append(int(entry.name))
            except OSError:
                continue
        return [pid for pid in found if pid != first]

    def kill_host(self, host: str) -> None:
        """Kill every process of a host at once, its slurmd included, as a power failure does."""
        for pid in self.processes_of(host):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue

    def start_slurmd(self, host: str) -> None:
        """Boot a host: start its slurmd, with an empty folder for temporary files."""
        shutil.rmtree(self.folder / host / "slurm", ignore_errors=True)
        (self.folder / host / "slurm").mkdir()
        self.check(["slurmd"], host=host)

    def cut(self, host: str) -> None:
        """Cut the link of a host."""
        self._switch("ip", "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Mend the link of a host."""
        self._switch("ip", "link", "set", host, "up")

    def add_bridge(self, host: str, name: str) -> None:
        """Add a bridge to a host, as Docker does: it has the same address on every host."""
        for command in (f"link add {name} type bridge", f"addr add 172.17.0.1/16 dev {name}", f"link set {name} up"):
            self.check(["ip", *command.split()], host=host)

    def leave_ipv4(self, n_hosts: int = 2) -> None:
        """Give the hosts IPv6 addresses in place of those of IPv4."""
        numbers = range(1, n_hosts + 1)
        lines = ["::1 localhost", *(f"fd00::{k} host{k}" for k in numbers)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")  # their /etc/hosts
        for k in numbers:
            self.check(f"ip -6 addr add fd00::{k}/64 dev eth0 nodad".split(), host=f"host{k}")
            self.check("ip -4 addr flush dev eth0".split(), host=f"host{k}")

    def _switch(self, *command: str) -> None:
        subprocess.run([HOSTS, "switch", *command], env=self._env, check=True)

    def mpirun(self, mpi: str, *hosts: str) -> list[str]:
        """Return the command by which mpirun of an MPI starts a rank on each host, without SLURM."""
        names, n = ",".join(hosts), ["-n", str(len(hosts))]
        if mpi == "mpich":
            return ["mpirun", *n, "-hosts", names, "-launcher", "rsh", "-launcher-exec", str(AGENT), "-iface", "eth0"]
        if mpi == "openmpi":
            venv = str(ROOT / ".venv" / "openmpi")
            return ["mpirun", *n, "--prefix", venv, "--host", names, "--prtemca", "plm_ssh_agent", str(AGENT)]
        exported = [word for name in ("MPI4PY_LIBMPI", "VIRTUAL_ENV", "PATH") for word in ("-x", name)]
        return [str(DEBIAN_MPIRUN), *n, "--host", names, "--mca", "plm_rsh_agent", str(AGENT), *exported]

    def wait_until_idle(self, seconds: float = 180.0) -> None:
        """Wait until all hosts are idle."""
        deadline = time.monotonic() + seconds
        while self.run(["sinfo", "-h", "-o", "%D %t"]).stdout.split() != [str(N_HOSTS), "idle"]:
            if time.monotonic() > deadline:
                raise TimeoutError(self.run(["sinfo"]).stdout + self.log())
            time.sleep(0.1)


def _outer_pid(folder: Path, host: str) -> int:
    """Return the number on this machine of the first process of a host, which has one in its namespace too."""
    machine = (folder / "machine.pid").read_text().strip()
    inner = (folder / f"{host}.pid").read_text().strip()
    space = os.readlink(f"/proc/{machine}/ns/pid")
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == space:
                numbers = next(line for line in (entry / "status").read_text().splitlines() if line.startswith("NSpid"))
                if numbers.split()[-1] == inner:
                    return int(entry.name)
        except OSError:
            continue
    raise RuntimeError(f"{host} is gone")


@contextmanager
def emulated_hosts(n_hosts: int = 2, *, delay_ms: float = 0, lost_fraction: float = 0) -> Iterator[Cluster]:
    """Create hosts without SLURM for the lifetime of the context.

    Args:
        n_hosts: Their number; 2 with a delay or a loss.
        delay_ms: Of the link between them, each way.
        lost_fraction: Of the frames on it.
    """
    with tempfile.TemporaryDirectory(prefix="cl", dir="/tmp") as name:  # short: paths of sockets are limited
        folder = Path(name)
        folder.chmod(0o755)
        env = {**os.environ, "HOSTS_DIR": str(folder), "SLURM_CONF": str(folder / "slurm.conf")}
        process = subprocess.Popen(
            [HOSTS, "run", "10gbit", str(delay_ms), str(lost_fraction), str(n_hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("the hosts did not start")
            yield Cluster(folder, env)
        finally:
            process.stdin.close()
            process.kill()  # with it the first process of their namespace ends, and with that one all others
            process.wait()


@contextmanager
def booted() -> Iterator[Cluster]:
    """Boot a cluster with SLURM for the lifetime of the context."""
    with emulated_hosts(N_HOSTS) as cluster:
        _start_slurm(cluster)
        yield cluster


def _start_slurm(cluster: Cluster) -> None:
    """Start munge and SLURM on the hosts, and wait until all of them are idle."""
    folder = cluster.folder
    for name in ("munge", "state", "spool", "log"):
        (folder / name).mkdir()
    (folder / "munge").chmod(0o711)
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    cluster.check(["munged", *(f"--{option}={folder}/munge/{file}" for option, file in files.items())])
    cluster.check(["slurmctld"])
    for k in range(1, N_HOSTS + 1):
        cluster.start_slurmd(f"host{k}")
    cluster.wait_until_idle()
