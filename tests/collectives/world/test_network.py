"""Bridges of container engines are kept from Open MPI, unless the user has chosen interfaces."""

from __future__ import annotations

import pytest

from mpitrain.collectives.world.network import EXCLUDE, INCLUDE, bridges_among, exclude_bridges


def test_bridges_are_known_by_their_names() -> None:
    names = ["lo", "eth0", "docker0", "ib0", "virbr0", "ens3", "cni-podman0", "bond0", "br0"]
    assert bridges_among(names) == ["docker0", "virbr0", "cni-podman0"]


def test_they_are_excluded_with_what_open_mpi_excludes_by_itself() -> None:
    environ: dict[str, str] = {}
    exclude_bridges(environ, ["lo", "eth0", "docker0", "virbr0"])
    assert environ == {EXCLUDE: "127.0.0.0/8,sppp,docker0,virbr0"}


@pytest.mark.parametrize("given", [{INCLUDE: "docker0"}, {EXCLUDE: "eth1"}])
def test_a_setting_of_the_user_stays(given: dict[str, str]) -> None:
    environ = dict(given)
    exclude_bridges(environ, ["eth0", "docker0"])
    assert environ == given


def test_nothing_is_set_where_there_is_no_bridge() -> None:
    environ: dict[str, str] = {}
    exclude_bridges(environ, ["lo", "eth0"])
    assert environ == {}
