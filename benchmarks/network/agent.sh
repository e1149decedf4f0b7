#!/usr/bin/env bash
# What mpirun calls in place of ssh to start its part on another of the hosts of hosts.sh:
#
#     agent.sh [-option ...] HOST command ...
#
# Like ssh it returns 255 when the command died of a signal.
set -uo pipefail

while [[ $1 == -* ]]; do
    shift
done
host=$1
shift
"$(dirname -- "${BASH_SOURCE[0]}")/hosts.sh" enter "$host" /bin/sh -c "$*"
code=$?
exit $((code > 128 ? 255 : code))
