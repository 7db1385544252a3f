#!/bin/sh
# Boots an instance, again after each reboot, and clears away what the kernel kept for it when it
# is over. Runs detached; its output is the console log.
#   boot.sh NAME DIR LOWER NETNS NET PORT MAC CGROUP
#     LOWER   overlay lower directories; DIR/upper and DIR/work are the instance's own
#     NETNS   the instance's network namespace; NET the provider's, with the bridge br0
#     PORT    the name of the veth end on the bridge
#     CGROUP  a cgroup v2 directory for this instance alone
# Files in DIR/credentials are handed to the instance as a container's manager does it (systemd.system-credentials(7)).
# Writes DIR/pid: "PID STARTTIME BOOTS" of the instance's PID 1 as seen from here.
# May not live here: addresses (cloud-init sets them), images, anything about the agent.
set -eu
umask 022
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

start_time() {
    stat=$(cat "/proc/$1/stat") || return 1
    set -- ${stat##*) }
    echo "${20}"
}

# A new namespace for each boot: a machine that restarts has no rules, addresses or flows left.
# Both ends of the pair are made inside namespaces, never in the host's.
make_network() {
    ip netns del "$netns" 2>/dev/null || :
    ip -n "$net" link del "$port" 2>/dev/null || :
    ip netns add "$netns"
    ip netns exec "$netns" sh -c 'echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad'
    ip -n "$netns" link set lo up
    ip -n "$netns" link add eth0 address "$mac" type veth peer name "$port" netns "$net"
    ip -n "$net" link set "$port" master br0 up
}

make_cgroup() {
    find "$cgroup" -depth -mindepth 1 -type d -exec rmdir {} + 2>/dev/null || :
    mkdir -p "$cgroup"
}

clear_up() {
    ip netns del "$netns" 2>/dev/null || :
    find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null || :
    rm -f "$dir/pid"
}

boot() {
    rm -f "$dir/pid" "$dir/pid.new"
    make_cgroup
    make_network
    ( echo 0 > "$cgroup/cgroup.procs"
      exec ip netns exec "$netns" unshare -f -p -m -u -i -C --kill-child \
          /bin/sh "$dir/boot.sh" --inside "$name" "$dir" "$lower" ) &
    outer=$!
    first=
    tries=0
    while [ -z "$first" ]; do
        first=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) || :
        first=${first%% *}
        tries=$((tries + 1))
        [ "$tries" -lt 500 ] || { echo "boot: no first process after 5 s"; return 1; }
        [ -n "$first" ] || sleep 0.01
    done
    # unshare itself leaves the cgroup: systemd wants its root for itself.
    echo "$outer" > "${cgroup%/*}/cgroup.procs" || :
    echo "$first $(start_time "$first") $boots" > "$dir/pid.new"
    mv "$dir/pid.new" "$dir/pid"
    status=0
    wait "$outer" || status=$?
    return "$status"
}

# Becomes the instance's PID 1.
inside() {
    name=$1 dir=$2 lower=$3
    until [ -e "$dir/pid" ]; do sleep 0.01; done
    mount --make-rprivate /
    mkdir -p "$dir/root"
    mount -t overlay overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" "$dir/root"
    cd "$dir/root"
    mount -t proc -o nosuid,nodev,noexec proc proc
    # Read-only, so that systemd-networkd does not wait for udev, which does not run here.
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs tmp
    mount -t tmpfs -o mode=755,nosuid tmpfs dev
    for node in null zero full random urandom tty; do
        : > "dev/$node"
        mount --bind "/dev/$node" "dev/$node"
    done
    mkdir dev/pts dev/shm dev/mqueue run/lock
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs dev/shm
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    ln -s /proc/self/fd/0 dev/stdin
    ln -s /proc/self/fd/1 dev/stdout
    ln -s /proc/self/fd/2 dev/stderr
    given=
    if [ -d "$dir/credentials" ]; then
        given=CREDENTIALS_DIRECTORY=/run/host/credentials
        mkdir -m 700 -p run/host/credentials
        cp "$dir"/credentials/* run/host/credentials/
        chmod 400 run/host/credentials/*
    fi
    hostname "$name"
    pivot_root . mnt
    umount -l /mnt
    # As the first process makes it on a machine (systemd.exec(5)): units get credentials by it.
    mount --make-rshared /
    cd /
    exec env -i container=portcullis-local PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $given \
        /lib/systemd/systemd </dev/null
}

if [ "$1" = --inside ]; then
    shift
    inside "$@"
fi

name=$1 dir=$2 lower=$3 netns=$4 net=$5 port=$6 mac=$7 cgroup=$8
trap clear_up EXIT
boots=0
while :; do
    boots=$((boots + 1))
    echo "boot: $name, boot $boots"
    status=0
    boot || status=$?
    # reboot(2) in a PID namespace ends its first process by SIGHUP, power off by SIGINT.
    [ "$status" -eq 129 ] || break
done
echo "boot: $name is off (status $status)"
