#!/bin/sh
# Runs in a mount and PID namespace of its own, so that nothing stays mounted whatever happens.
#   image.sh base ROOT SUITE LIST       makes a root with debootstrap (LIST: packages, comma-separated)
#   image.sh packages LAYER BELOW LIST  installs packages (LIST: separated by spaces) on a layer
#   image.sh agent LAYER BELOW DEB      installs the agent on a layer
# BELOW: overlay lower directories, the uppermost first; the layer gets upper/.
# May not live here: choices. What goes in is decided by image.rs and by the package itself.
set -eu
umask 022
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount --make-rprivate /

# Nothing that is installed may start: 101 is "forbidden by policy" (invoke-rc.d(8)).
forbid_starts() {
    printf '#!/bin/sh\nexit 101\n' > "$1/usr/sbin/policy-rc.d"
    chmod 755 "$1/usr/sbin/policy-rc.d"
}

# What makes an image an image: no identity of its own, no caches, no name servers it can't reach.
strip() {
    rm -f "$1/usr/sbin/policy-rc.d" "$1"/etc/ssh/ssh_host_*_key* "$1/var/lib/dbus/machine-id"
    : > "$1/etc/machine-id"
    : > "$1/etc/resolv.conf"
    rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/archives/*.deb "$1"/var/cache/apt/*.bin
    rm -rf "$1"/var/lib/cloud "$1"/var/log/journal "$1"/var/log/apt "$1"/var/log/dpkg.log
}

make_base() {
    root=$1 suite=$2 packages=$3
    debootstrap --variant=minbase --include="$packages" "$suite" "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    forbid_starts "$root"
    chroot "$root" apt-get -q update
    # Not in debootstrap's own list: there cloud-init fails on virtual packages.
    chroot "$root" apt-get -q -y --no-install-recommends install cloud-init
    chroot "$root" apt-get -q clean
    chroot "$root" systemctl -q enable ssh.service
    # ifupdown enables itself; where it is, nothing else may set addresses.
    [ -e "$root/usr/sbin/ifup" ] || chroot "$root" systemctl -q enable systemd-networkd.service
    # No timers that would look for the internet from an instance that has none.
    chroot "$root" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer \
        dpkg-db-backup.timer fstrim.timer man-db.timer
    printf 'datasource_list: [NoCloud, None]\n' > "$root/etc/cloud/cloud.cfg.d/95-local.cfg"
    # cloud-init 22 does not pass accept-ra on; waiting for a router that is not there costs 12 s.
    mkdir -p "$root/etc/systemd/network/10-cloud-init-eth0.network.d"
    printf '[Network]\nIPv6AcceptRA=no\n' > "$root/etc/systemd/network/10-cloud-init-eth0.network.d/no-ra.conf"
    strip "$root"
}

# Mounts a layer over those below as $root, with what installing needs.
open_layer() {
    layer=$1 root=$1/root
    mkdir -p "$layer/upper" "$layer/work" "$root"
    mount -t overlay overlay -o "lowerdir=$2,upperdir=$layer/upper,workdir=$layer/work" "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    forbid_starts "$root"
}

close_layer() {
    strip "$root"
    umount "$root/proc" "$root"
    rm -rf "$layer/work" "$root"
}

install_packages() {
    open_layer "$1" "$2"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    chroot "$root" apt-get -q update
    # shellcheck disable=SC2086
    chroot "$root" apt-get -q -y --no-install-recommends install $3
    chroot "$root" apt-get -q clean
    close_layer
}

install_agent() {
    open_layer "$1" "$2"
    mkdir -p "$root/run/portcullis-image"
    mount -t tmpfs tmpfs "$root/run/portcullis-image"
    cp "$3" "$root/run/portcullis-image/agent.deb"
    chroot "$root" dpkg -i /run/portcullis-image/agent.deb
    umount "$root/run/portcullis-image"
    rmdir "$root/run/portcullis-image"
    # The uplink is a veth here, which the agent must not have to guess.
    mkdir -p "$root/etc/portcullis/conf.d"
    printf '[firewall]\nuplinks = ["eth0"]\n' > "$root/etc/portcullis/conf.d/50-local.toml"
    close_layer
}

case $1 in
    base) make_base "$2" "$3" "$4" ;;
    packages) install_packages "$2" "$3" "$4" ;;
    agent) install_agent "$2" "$3" "$4" ;;
    *) echo "image.sh: unknown step $1" >&2; exit 2 ;;
esac
