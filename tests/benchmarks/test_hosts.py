"""The benchmark between two hosts: what it computes from what was measured, and its helpers, without any host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def hosts(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.network.hosts")


@pytest.fixture(scope="module")
def tcp(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("benchmarks.network.tcp")


def steps(of_alone: float) -> list[dict[str, Any]]:
    """Computing alone and with an overlapped exchange."""
    ratios = {"alone": 1.0, "easgd, tau 10": 1.3, "easgd, tau 10, overlap": of_alone, "as many bytes by sockets": 1.0}
    rows = [{"step": name, "median_seconds": 0.01 * ratio, "of_alone": ratio} for name, ratio in ratios.items()]
    made_up = [{**row, "model": "made up", "of_alone": 2.0} for row in rows]  # no bar is for it
    return made_up + [{**row, "model": "resnet20"} for row in rows]


def document(**changes: Any) -> dict[str, Any]:
    """TCP carries 200 MB/s, an exchange of 16 MB takes 0.2 s, the longest stall 9 ms."""
    transfer = {"bytes": 16_000_000, "operation": "exchange", "median_seconds": 0.2, "slowest_seconds": 0.3}
    small = {**transfer, "bytes": 1_000_000, "median_seconds": 0.1, "wire_bytes": 2_000_000}
    stall = {"target": "nothing", "n_exchanges": 3, "median_seconds": 0.001, "longest_seconds": 0.009}
    whole = {
        "tcp": [{"there": 90e6, "back": 110e6, "both": both} for both in (190e6, 200e6, 700e6)],
        "transfers": [small, {**transfer, "wire_bytes": 32_000_000}],
        "stalls": [stall],
        "latency": {
            "round_trip_seconds": 0.01,
            "operations": [{"operation": "exchange, one rank", "median_seconds": 0.025}],
        },
        "large": [{"delay_ms": 10, "bytes": 64_000_000, "seconds": 0.4, "socket_seconds": 0.36}],
        "overlaps": steps(1.04),
    }
    return {**whole, **changes}


def judged(hosts: ModuleType, **changes: Any) -> list[dict[str, Any]]:
    whole = document(**changes)
    whole["transfers"] = hosts.with_shares(whole)
    return list(hosts.verdicts(whole))


def test_a_share_is_of_the_median_of_what_tcp_carries_both_ways(hosts: ModuleType) -> None:
    small, large = hosts.with_shares(document())
    assert small["share"] == pytest.approx(0.1)
    assert large["bytes_per_second"] == pytest.approx(160e6)
    assert large["share"] == pytest.approx(0.8)


def test_latency_is_counted_in_round_trips(hosts: ModuleType) -> None:
    (row,) = hosts.in_round_trips(document())
    assert row["round_trips"] == pytest.approx(2.5)


def test_the_bars_judge_large_exchanges_and_stalls(hosts: ModuleType) -> None:
    assert [bar["passed"] for bar in judged(hosts)] == [False, True, True, True, True]
    faster = [{**row, "median_seconds": 0.18} for row in document()["transfers"]]
    assert [bar["passed"] for bar in judged(hosts, transfers=faster)] == [True, True, True, True, True]
    late = [{**document()["stalls"][0], "longest_seconds": 0.021}]
    assert [bar["passed"] for bar in judged(hosts, stalls=late)] == [False, True, False, True, True]
    assert [bar["passed"] for bar in judged(hosts, transfers=faster[:1])] == [True, True, True, True]  # none is large
    assert [bar["passed"] for bar in judged(hosts, overlaps=steps(1.06))] == [False, True, True, True, False]
    slow = [{**document()["large"][0], "seconds": 0.43}]
    assert [bar["passed"] for bar in judged(hosts, large=slow)] == [False, True, True, False, True]


def test_every_row_is_in_a_table(hosts: ModuleType) -> None:
    whole = document()
    whole["transfers"] = hosts.with_shares(whole)
    whole["latency"]["operations"] = hosts.in_round_trips(whole)
    lines = hosts.tables(whole)
    assert lines[0] == "TCP, MB/s: 90.0 there, 110.0 back, 200.0 both at once"
    assert sum("exchange" in line and "%" in line for line in lines) == 2
    assert any("16 MB" in line and "80%" in line for line in lines)
    assert any("nothing" in line and "9.0" in line for line in lines)
    assert any("2.5" in line for line in lines)
    assert any("64 MB" in line and "400" in line and "360" in line for line in lines)


@pytest.mark.parametrize(
    ("is_root", "absent", "named"), [(False, (), "root"), (True, ("ip", "nsenter"), "ip, nsenter")]
)
def test_what_is_missing_is_named(hosts: ModuleType, is_root: bool, absent: tuple[str, ...], named: str) -> None:
    tools = {name: None if name in absent else f"/sbin/{name}" for name in hosts.TOOLS}
    problem = hosts.missing(is_root, tools)
    assert problem is not None
    assert problem.endswith(f"here is no {named}")
    assert "\n" not in problem


def test_nothing_is_missing_where_everything_is(hosts: ModuleType) -> None:
    assert hosts.missing(True, {name: f"/sbin/{name}" for name in hosts.TOOLS}) is None


def test_each_mpi_is_told_the_hosts_and_the_agent(hosts: ModuleType) -> None:
    flags, environment = hosts.launcher("openmpi", "/venv", 2)
    assert "host1:2,host2:2" in flags
    assert str(hosts.AGENT) in flags
    assert not environment
    flags, environment = hosts.launcher("mpich", "/venv", 1)
    assert flags == ["-hosts", "host1:1,host2:1"]
    assert environment["HYDRA_LAUNCHER_EXEC"] == str(hosts.AGENT)
    assert hosts.HOSTS.exists()
    assert hosts.AGENT.exists()


def test_the_last_document_counts_and_its_absence_is_an_error(hosts: ModuleType) -> None:
    assert hosts.document_in('noise\n{"a": 1}\n{"a": 2}\nbye\n') == {"a": 2}
    with pytest.raises(hosts.HostsError, match="lost a daemon"):
        hosts.document_in("lost a daemon\n")


def test_exchanges_by_sockets_carry_all_bytes_both_ways(tcp: ModuleType) -> None:
    n_bytes = 3 * tcp.PIECE_BYTES + 5
    first, second = socket.socketpair()
    with first, second:
        ends = [tcp.Exchanges(end, n_bytes) for end in (first, second)]
        for _ in range(3):
            for end in ends:
                end.start()
        for end in ends:
            end.stop()
        first.setblocking(False)
        second.setblocking(False)
        for end in (first, second):  # nothing is left over
            with pytest.raises(BlockingIOError):
                end.recv(1)


def both_ends(here: Callable[[], float], there: Callable[[], float]) -> tuple[float, float]:
    results = [0.0]
    thread = threading.Thread(target=lambda: results.append(there()))
    thread.start()
    mine = here()
    thread.join()
    return mine, results[-1]


@pytest.mark.parametrize(("first_sends", "second_sends"), [(True, True), (True, False)])
def test_bandwidth_is_what_arrived(tcp: ModuleType, first_sends: bool, second_sends: bool) -> None:
    first, second = socket.socketpair()
    with first, second:
        at_first, at_second = both_ends(
            lambda: tcp.bandwidth(first, 0.3, sends=first_sends), lambda: tcp.bandwidth(second, 0.3, sends=second_sends)
        )
    assert (at_first > 0) == second_sends
    assert (at_second > 0) == first_sends


def test_both_ends_see_the_round_trips(tcp: ModuleType) -> None:
    first, second = socket.socketpair()
    with first, second:
        seconds = both_ends(
            lambda: tcp.round_trip(first, 5, first=True), lambda: tcp.round_trip(second, 5, first=False)
        )
    assert all(value > 0 for value in seconds)


@pytest.fixture
def cluster(hosts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(hosts.os, "sched_getaffinity", lambda pid: {5, 1, 3, 2})
    monkeypatch.setattr(hosts, "hosts", lambda n_hosts: nullcontext({"HOSTS_DIR": "here"}))
    monkeypatch.setenv("VIRTUAL_ENV", "/env")
    return hosts.Cluster


def test_ranks_on_this_machine_are_started_by_the_local_script(cluster: Callable[..., Any]) -> None:
    with cluster(1, {"NODES": "2"}) as here:
        words, env = here.on_ranks(3, ["true"], flags=["--flag"], is_bound=True)
    assert words[0].endswith("jobs/local.sh")
    assert words[1:] == ["3", "--flag", "true"]
    assert env["NODES"] == "2"
    assert "HOSTS_DIR" not in env
    assert here.cores == 4


def test_bound_hosts_share_the_cores_of_the_machine(cluster: Callable[..., Any]) -> None:
    with cluster(2) as two:
        words, env = two.on_ranks(4, ["true"], is_bound=True)
    assert two.cores == 2
    assert "cores=(1,2 3,5); exec taskset -c ${cores[OMPI_COMM_WORLD_RANK / 2]}" in words[words.index("-c") + 1]
    assert words[-1] == "true"
    assert "host1:2,host2:2" in words
    assert (env["HOSTS_DIR"], env["VIRTUAL_ENV"]) == ("here", "/env")


def test_hosts_have_all_cores_unless_they_are_bound(cluster: Callable[..., Any]) -> None:
    with cluster(2) as two:
        words, _ = two.on_ranks(4, ["true"], flags=["--flag"])
        commands = two.on_each(["ls"])
    assert words[-2:] == ["--flag", "true"]
    assert "taskset" not in " ".join(words)
    assert [(name, words[1:]) for name, words, _ in commands] == [
        ("host1", ["enter", "host1", "ls"]),
        ("host2", ["enter", "host2", "ls"]),
    ]
