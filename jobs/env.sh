# shellcheck shell=bash
# Settings of the ranks on a cluster. jobs/lib.sh sources this file before it starts any; adapt it to your site.
# Variables that are set already are kept.

# One thread per core that the job has for a rank: more threads of different ranks would take turns on the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# Binding. A rank that moves between cores loses its caches, and on two sockets its memory. mpirun binds ranks to cores by
# itself; srun does where the site has TaskPlugin=task/affinity, and SLURM_CPU_BIND=cores asks for it (where the site has
# not, srun prints a line and goes on). mpirun binds the ranks of every job of a node to the same first cores unless the
# site confines jobs by cgroups; then, and where ranks outnumber the cores:
# export OMPI_MCA_hwloc_base_binding_policy=none PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1

# srun gives its tasks the --cpus-per-task of the job only if it is told again (since SLURM 22.05).
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}

# Open MPI 5 from PyPI: without this, every window prints "OSC UCX component priority set inside component query failed".
# Open MPI 4.1 of Debian and Ubuntu: its default excludes the only component whose windows work over TCP.
export OMPI_MCA_osc=${OMPI_MCA_osc:-^ucx}

# The network that carries the vectors. Unset, every MPI chooses the fastest interface it sees, and may choose one that
# the nodes cannot reach each other on (docker0, virbr0, a management network): the job then hangs, or crawls.
# NETWORK=ib0 or NETWORK=eth1 names an interface; NETWORK=mlx5_0:1 names a device of InfiniBand or RoCE, for UCX only.
if [ -n "${NETWORK:-}" ]; then
    export UCX_NET_DEVICES=${UCX_NET_DEVICES:-$NETWORK} # UCX: MPICH, and Open MPI's pml ucx
    if [[ $NETWORK != *:* ]]; then
        export OMPI_MCA_btl_tcp_if_include=${OMPI_MCA_btl_tcp_if_include:-$NETWORK} # Open MPI: messages
        export OMPI_MCA_oob_tcp_if_include=${OMPI_MCA_oob_tcp_if_include:-$NETWORK} # Open MPI 4: its daemons
        export PRTE_MCA_oob_tcp_if_include=${PRTE_MCA_oob_tcp_if_include:-$NETWORK} # Open MPI 5: its daemons
        export HYDRA_IFACE=${HYDRA_IFACE:-$NETWORK}                                 # MPICH: its daemons
        export FI_TCP_IFACE=${FI_TCP_IFACE:-$NETWORK}                               # libfabric
    fi
fi

# Open MPI notices a node that has vanished by its keep-alive: after 8 minutes by default, after 40 s with these.
export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-10}
export OMPI_MCA_oob_tcp_keepalive_intvl=${OMPI_MCA_oob_tcp_keepalive_intvl:-10}
export OMPI_MCA_oob_tcp_keepalive_probes=${OMPI_MCA_oob_tcp_keepalive_probes:-3}
export PRTE_MCA_oob_tcp_keepalive_time=${PRTE_MCA_oob_tcp_keepalive_time:-10}
export PRTE_MCA_oob_tcp_keepalive_intvl=${PRTE_MCA_oob_tcp_keepalive_intvl:-10}
export PRTE_MCA_oob_tcp_keepalive_probes=${PRTE_MCA_oob_tcp_keepalive_probes:-3}

# The folder on every node for a data set that the job copies there (STAGE=FILE): reading a file on a parallel file
# system from every rank at random is slow, and slows others down. The path must be the same on all nodes and in
# every restart of the job, because a resumed run reads its data where it began.
export STAGE_DIR=${STAGE_DIR:-/tmp/mpitrain-$(id -un)}
