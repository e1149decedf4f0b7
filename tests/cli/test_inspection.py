"""The table over hosts and the verdicts of ``mpitrain info``, from facts that each test states."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpitrain.cli.inspection import RankFacts, between_nodes, host_table, interfaces, launcher, verdicts
from mpitrain.collectives.topology.allreduce_cost import Link

GIB = 2**30
FACTS = RankFacts(
    rank=0,
    host="host1",
    cores=(0,),
    machine_cores=4,
    shared_memory=64 * GIB,
    gpus=(),
    mpi="Open MPI v5.0.11",
    versions={"python": "3.11.2", "torch": "2.13.0"},
    interfaces={"eth0": ("10.0.0.1",)},
    network={},
    launcher="srun",
)


def launched(*hosts: str, **changes: object) -> list[RankFacts]:
    """Ranks on these hosts, each bound to a core of its own; `changes` apply to the last rank."""
    facts = []
    for rank, host in enumerate(hosts):
        local = hosts[:rank].count(host)
        addresses = {"eth0": (f"10.0.0.{host[-1]}",)}
        facts.append(replace(FACTS, rank=rank, host=host, cores=(local,), interfaces=addresses))
    facts[-1] = replace(facts[-1], **changes)  # type: ignore[arg-type]
    return facts


def only(facts: list[RankFacts], threads: str = "multiple") -> str:
    """The one verdict on these facts."""
    [line] = verdicts(facts, threads=threads)
    assert "\n" not in line
    return line


def test_a_sound_launch_has_no_verdict() -> None:
    assert verdicts(launched("host1", "host1", "host2", "host2"), threads="multiple") == []
    assert verdicts(launched("host1"), threads="single") == []  # threads matter between nodes only


def test_a_low_thread_level_is_named_with_the_cure() -> None:
    assert only(launched("host1", "host2"), "serialized").startswith("MPI provides only the thread level 'serialized'")


def test_ranks_bound_to_too_few_cores_and_too_many_ranks_are_told_apart() -> None:
    bound = [replace(one, cores=(0,)) for one in launched("host1", "host1")]
    assert "2 ranks are bound to 1 of 4 cores" in only(bound)
    crowded = [replace(one, cores=(0, 1, 2, 3)) for one in launched(*["host1"] * 5)]
    assert "host1: 5 ranks take turns on 4 cores" in only(crowded)


@pytest.mark.parametrize(
    ("free", "text"), [(64 * 2**20, "host2: /dev/shm has 67.1 MB free"), (None, "host2: /dev/shm does not exist")]
)
def test_little_shared_memory_on_one_host_is_named(free: int | None, text: str) -> None:
    line = only(launched("host1", "host2", shared_memory=free))
    assert line.startswith(text)
    assert "--shm-size" in line


def test_different_versions_name_both_hosts() -> None:
    other = {"python": "3.11.2", "torch": "2.6.0"}
    assert only(launched("host1", "host2", versions=other)).startswith(
        "torch differs: 2.13.0 on host1, 2.6.0 on host2 (rank 1)"
    )
    assert only(launched("host1", "host2", mpi="MPICH 5.0.2")).startswith("MPI differs: Open MPI v5.0.11 on host1")


def test_ranks_that_share_gpus_are_named() -> None:
    facts = [replace(one, gpus=("H200",)) for one in launched("host1", "host1")]
    assert only(facts).startswith("host1: 2 ranks see 1 GPUs")


def test_an_address_that_several_hosts_have_is_no_way_between_them() -> None:
    facts = launched("host1", "host2")
    bridges = [replace(one, interfaces={**one.interfaces, "bridge7": ("172.17.0.1",)}) for one in facts]
    line = only(bridges)
    assert line.startswith("bridge7: the same address on several hosts")
    assert "NETWORK=eth0" in line
    chosen = [replace(one, network={"UCX_NET_DEVICES": "eth0"}) for one in bridges]
    assert verdicts(chosen, threads="multiple") == []


def test_a_bridge_that_init_keeps_from_mpi_needs_no_verdict() -> None:
    facts = launched("host1", "host2")
    bridges = [replace(one, interfaces={**one.interfaces, "docker0": ("172.17.0.1",)}) for one in facts]
    assert verdicts(bridges, threads="multiple") == []


def test_several_usable_interfaces_are_named() -> None:
    facts = launched("host1", "host2")
    two = [replace(one, interfaces={**one.interfaces, "ib0": (f"10.1.0.{one.rank}",)}) for one in facts]
    assert "(eth0, ib0)" in only(two)


def test_the_table_has_a_row_per_host_and_marks_what_differs() -> None:
    facts = launched("host1", "host1", "host2", mpi="MPICH 5.0.2")
    header, _, first, second = host_table(facts)
    assert header.count("|") == first.count("|") == second.count("|")
    assert "host1" in first
    assert "*" not in first
    assert "MPICH 5.0.2 *" in second
    assert "1 *" in second  # ranks
    assert second.count("*") == 2


def test_the_launcher_is_the_one_that_started_the_ranks() -> None:
    assert launcher({}) == "none"
    assert launcher({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}) == "srun"
    inside = {"SLURM_STEP_ID": "4294967291", "OMPI_COMM_WORLD_SIZE": "2"}  # mpirun starts its daemons with srun
    assert launcher(inside) == "mpirun (Open MPI)"


def test_interfaces_are_those_of_this_machine_without_the_loopback() -> None:
    found = interfaces()
    assert "lo" not in found
    assert all(addresses for addresses in found.values())
    assert all("127.0.0.1" not in addresses for addresses in found.values())


def test_the_network_has_units_and_a_choice_for_each_size_and_number_of_nodes() -> None:
    measured, used = Link(latency=2e-5, mpi_bandwidth=1e9), Link()
    section = between_nodes(3, measured, used, "assumed")
    assert section["measured"]["latency_us"] == 20.0
    assert section["used by runs"] == {"origin": "assumed", **used.document()}
    assert section["all-reduce on 3 nodes"]["100 MB"] == "ring"
    assert section["all-reduce on 1024 nodes"]["1 kB"] == "mpi"
    assert list(section)[2:] == [f"all-reduce on {n} nodes" for n in (3, 64, 1024)]
