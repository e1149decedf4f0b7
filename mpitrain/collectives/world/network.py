"""The network interfaces of this host, and those that cannot connect it with other hosts.

Container engines and hypervisors make bridges (``docker0``, ``virbr0``) with the same address on every host. Open MPI
takes them for a way between the hosts: the first message goes to the sender's own host, and the job ends or hangs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, MutableMapping

BRIDGES = ("docker", "virbr", "podman", "cni", "lxcbr", "lxdbr", "flannel")
"""How the names of such bridges begin."""

INCLUDE, EXCLUDE = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"
ALWAYS_EXCLUDED = ("127.0.0.0/8", "sppp")
"""Open MPI's own value of EXCLUDE."""


def bridges_among(names: Iterable[str]) -> list[str]:
    """Return those names that belong to bridges to containers or virtual machines of a host. Local."""
    return [name for name in names if name.startswith(BRIDGES)]


def exclude_bridges(environ: MutableMapping[str, str] = os.environ, names: Iterable[str] | None = None) -> None:
    """Exclude bridges from the interfaces that Open MPI will use. Local; a setting of the user has priority.

    Args:
        environ: The environment to change, before MPI starts.
        names: The interfaces; by default those of this host.
    """
    if INCLUDE in environ or EXCLUDE in environ:
        return
    bridges = bridges_among([name for _, name in socket.if_nameindex()] if names is None else names)
    if bridges:
        environ[EXCLUDE] = ",".join((*ALWAYS_EXCLUDED, *bridges))
