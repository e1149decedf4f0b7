#!/usr/bin/env bash
# Hosts on one machine, host1, host2, ..., with links between them. Needs root, iproute2 and util-linux.
#
#     hosts.sh run 1gbit 0             two hosts; the link carries that much each way (tc's tbf)
#     hosts.sh run 1gbit 5             the same, and takes that many milliseconds each way (delay.py)
#     hosts.sh run 1gbit 5 0.01        the same, and loses one frame in a hundred
#     hosts.sh run 1gbit 0 0 4         four hosts on a switch
#     hosts.sh enter HOST command ...  run a command on one of them, also from another one
#     hosts.sh switch command ...      run a command beside the switch: ip link set host3 down cuts the link of host3
#
# HOSTS_DIR names an empty folder for their state. A host has its own network, host name, IPC, mounts, /dev/shm and
# /sys. "run" prints "ready" when both are there; they live as long as its standard input is open. All their processes
# are in one process namespace whose first one reads it: when that ends, however it came, the kernel ends the others,
# and with them go namespaces and devices. The network of this machine has no part in it.
set -euo pipefail

: "${HOSTS_DIR:?}"
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
subnet=10.77.0

run() {
    exec unshare --fork --pid --kill-child --mount --net --propagation private "$here/hosts.sh" machine "$@"
}

# The first process of the process namespace.
machine() {
    local rate=$1 delay=$2 loss=${3:-0} n_hosts=${4:-2} host pid pids=() hosts=()
    read -r pid _ < /proc/self/stat # as those outside know it
    echo "$pid" > "$HOSTS_DIR/machine.pid"
    mount -t proc proc /proc
    echo '127.0.0.1 localhost' > "$HOSTS_DIR/hosts"
    for ((k = 1; k <= n_hosts; k++)); do
        hosts+=("host$k")
        echo "$subnet.$k host$k" >> "$HOSTS_DIR/hosts"
    done
    for host in "${hosts[@]}"; do
        mkdir "$HOSTS_DIR/$host"
        unshare --net --uts --ipc --mount --propagation private "$here/hosts.sh" host "$host" &
        wait_until test -e "$HOSTS_DIR/$host.pid"
        pids+=("$(< "$HOSTS_DIR/$host.pid")")
    done
    if [ "$n_hosts" -gt 2 ]; then
        ip link add switch type bridge
        ip link set switch up
        for host in "${hosts[@]}"; do
            ip link add eth0 netns "${pids[${host#host} - 1]}" type veth peer name "$host"
            ip link set "$host" master switch up
        done
    elif [ "$delay $loss" = "0 0" ]; then
        ip link add eth0 netns "${pids[0]}" type veth peer name eth0 netns "${pids[1]}"
    else
        python3 "$here/delay.py" "$delay" "$loss" "${pids[@]}" "$HOSTS_DIR/delay.ready" &
        wait_until test -e "$HOSTS_DIR/delay.ready"
    fi
    for pid in "${pids[@]}"; do
        nsenter --target "$pid" --net --uts "$here/hosts.sh" link "$rate"
    done
    for pid in "${pids[@]}"; do
        wait_until is_up "$pid" # UCX takes no other device
    done
    echo ready
    while read -r _; do :; done # not cat: a shell also reaps the children that ended processes leave behind
}

# Until a command succeeds, for 10 s at most.
wait_until() {
    local k
    for ((k = 0; k < 500; k++)); do
        ! "$@" || return 0
        sleep 0.02
    done
    exit 1
}

is_up() {
    nsenter --target "$1" --net ip -o link show eth0 | grep -q 'LOWER_UP.* state U[PN]'
}

# The first process of a host.
host() {
    mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
    mount -t sysfs sysfs /sys # MPIs look for network devices there
    mount --bind "$HOSTS_DIR/hosts" /etc/hosts
    hostname "$1"
    echo $$ > "$HOSTS_DIR/$1.new"
    mv "$HOSTS_DIR/$1.new" "$HOSTS_DIR/$1.pid"
    exec sleep infinity
}

# Sets up this host's end of the link.
link() {
    local name
    name=$(hostname)
    ip addr add "$subnet.${name#host}/24" dev eth0
    ip link set lo up
    ip link set eth0 up
    tc qdisc replace dev eth0 root tbf rate "$1" burst 256kb latency 50ms
}

switch() {
    exec nsenter --target "$(< "$HOSTS_DIR/machine.pid")" --net -- "$@"
}

enter() {
    local host=$1
    if [ -z "${HOSTS_INSIDE-}" ]; then
        HOSTS_INSIDE=1 exec nsenter --target "$(< "$HOSTS_DIR/machine.pid")" --pid --mount --wd="$PWD" -- \
            "$here/hosts.sh" enter "$@"
    fi
    shift
    TMPDIR=$HOSTS_DIR/$host exec nsenter --target "$(< "$HOSTS_DIR/$host.pid")" --net --uts --ipc --mount \
        --wd="$PWD" -- "$@"
}

"$@"
