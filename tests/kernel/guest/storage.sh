# Encryption at rest: disks of each kind, and what is seen of them.

. /guest/luks.sh

lvm() { /usr/sbin/lvm "$@" --config 'activation{udev_sync=0 udev_rules=0 monitoring=0} devices{external_device_info_source="none"} global{use_lvmpolld=0}'; }

lvm_on_luks() {
	format --type luks2 /dev/vdb && open /dev/vdb pv && lvm pvcreate /dev/mapper/pv && lvm vgcreate vg0 /dev/mapper/pv &&
		lvm lvcreate -an -Zn -Wn -L 24M -n data vg0 && lvm lvcreate -an -Zn -Wn -L 8M -n swap vg0 && lvm vgchange -ay vg0 && lvm vgmknodes &&
		on /dev/mapper/vg0-data /lvm-on-luks && mkswap /dev/mapper/vg0-swap && swapon /dev/mapper/vg0-swap
}

luks_on_lvm() {
	lvm pvcreate /dev/vdc && lvm vgcreate vg1 /dev/vdc && lvm lvcreate -an -Zn -Wn -L 48M -n outer vg1 && lvm vgchange -ay vg1 && lvm vgmknodes &&
		format --type luks2 /dev/mapper/vg1-outer && open /dev/mapper/vg1-outer inner && on /dev/mapper/inner /luks-on-lvm
}

raid() { mdadm --create /dev/md0 --run --assume-clean --metadata=1.2 --level=1 --raid-devices=2 "$@" && on /dev/md0 /raid; }

half_a_raid() { format --type luks1 /dev/vdd && open /dev/vdd leg0 && raid /dev/mapper/leg0 /dev/vde; }

whole_raid() {
	umount /raid && mdadm --stop /dev/md0 && format --type luks1 /dev/vde && open /dev/vde leg1 &&
		mdadm --zero-superblock /dev/mapper/leg0 && raid /dev/mapper/leg0 /dev/mapper/leg1
}

half_a_btrfs() {
	format --type luks2 /dev/vdf && open /dev/vdf tree && mkfs.btrfs -q -M -d single -m single /dev/mapper/tree &&
		mkdir -p /btrfs && mount -t btrfs /dev/mapper/tree /btrfs && btrfs device add -f /dev/vdg /btrfs
}

whole_btrfs() { btrfs device remove /dev/vdg /btrfs; }

plain() {
	cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 256 --key-file /dev/urandom /dev/vdh short &&
		mkswap /dev/mapper/short && swapon /dev/mapper/short
}

# image FILE FOLDER: a file as a disk.
image() { dd if=/dev/zero of="$1" bs=1M count=4 && device=$(losetup -f) && losetup "$device" "$1" && on "$device" "$2"; }

null() {
	cryptsetup open --type plain --cipher cipher_null-ecb --key-size 128 --key-file /dev/urandom /dev/vdg null && on /dev/mapper/null /null
}

check() { agent check --format json; }
says() { agent status --format json | grep -A 12 '"storage.encrypted"' | tr -d ' \n' | grep -qF "$1"; }

try disks disks
try empty check
try luks2-partitions partitions
try luks2 luks2
try first check
try lvm-on-luks lvm_on_luks
try luks-on-lvm luks_on_lvm
try half-a-raid half_a_raid
try half-a-btrfs half_a_btrfs
try plain plain
try image-plain image /plain/image /image-plain
try image-luks image /luks2/image /image-luks
try half check
try half-record /guest/record
try whole-raid whole_raid
try whole-btrfs whole_btrfs
try null null
try whole check
try whole-record /guest/record

# The daemon is told of each change by the kernel.
try daemon daemon
sed 's/"generation": 1/"generation": 2/; s/}$/, "storage": {"attested": [{"by": "cloud.example", "algorithm": "AES-256", "disks": ["disk-0"]}]}}/' /guest/storage.json >/tmp/claim.json
try spec agent apply --spec /guest/storage.json
try absent eventually says '"state":"absent"'
off() { umount /null && cryptsetup close null && umount /image-plain && losetup -d /dev/loop0; }
try off off
try claim agent apply --spec /tmp/claim.json
try attested eventually says '"state":"attested"'
try attested-status agent status --format json
try umount umount /plain
try lesser eventually says '"state":"verified"'
try lesser-status agent status --format json
try swapoff swapoff /dev/mapper/short
try verified eventually says '"status":"pass"'
try verified-status agent status --format json
