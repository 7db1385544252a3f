# Disks with and without LUKS, for scripts. Keys cost little to derive, and are no secret.

export DM_DISABLE_UDEV=1
key=/tmp/key
printf 'not a secret at all, only long enough' >$key

format() { cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file $key "$@"; }
open() { cryptsetup open --key-file $key "$@"; }

# on DEVICE FOLDER: a file system there.
on() {
	mke2fs "$1" >/dev/null && mkdir -p "$2" && mount -t ext4 "$1" "$2"
}

disks() {
	modprobe -a virtio_pci virtio_blk loop dm_mod dm_crypt raid1 btrfs
	eventually [ -b /dev/vdh ] && mkdir -p /run/cryptsetup /run/lvm /run/lock/lvm /run/mdadm
}

partitions() {
	printf 'o\nn\np\n1\n\n+30M\nn\np\n2\n\n+60M\nn\np\n3\n\n\nw\n' | fdisk /dev/vda
	eventually [ -b /dev/vda3 ] && on /dev/vda1 /boot && chmod 755 /boot && on /dev/vda3 /plain
}

luks2() { format --type luks2 --cipher aes-xts-plain64 --key-size 512 /dev/vda2 && open /dev/vda2 luks2 && on /dev/mapper/luks2 /luks2; }
