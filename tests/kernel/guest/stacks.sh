# Encryption at rest: what is stacked in earnest, and what only looks encrypted.

. /guest/luks.sh

lvm() { /usr/sbin/lvm "$@" --config 'activation{udev_sync=0 udev_rules=0 monitoring=0} devices{external_device_info_source="none"} global{use_lvmpolld=0}'; }
check() { agent check --format json; }

modules() {
	modprobe -a virtio_pci virtio_blk loop dm_mod dm_crypt dm_snapshot dm_multipath dm_round_robin dm_integrity raid1 bcache zram overlay
	eventually [ -b /dev/vdx ] && mkdir -p /run/cryptsetup /run/lvm /run/lock/lvm /run/mdadm
}

# random NAME DEVICE: plain dm-crypt with a key that nobody keeps.
random() { cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file /dev/urandom "$2" "$1"; }

swap() { mkswap "$1" >/dev/null && swapon "$1"; }

random_swap() { random swap /dev/vdb && swap /dev/mapper/swap; }

# compressed NUMBER [DISK]: zram, whose pages may move on to a disk.
compressed() {
	[ -e "/dev/zram$1" ] || cat /sys/class/zram-control/hot_add >/dev/null
	[ -z "${2-}" ] || echo "$2" >"/sys/block/zram$1/backing_dev"
	echo 8M >"/sys/block/zram$1/disksize" && swap "/dev/zram$1"
}

zrams() { compressed 0 && compressed 1 /dev/vdc && random spill /dev/vdd && compressed 2 /dev/mapper/spill; }

# cached DISK CACHE
cached() {
	make-bcache --bucket 16k -B "$1" -C "$2" >/dev/null && echo "$1" >/sys/fs/bcache/register && echo "$2" >/sys/fs/bcache/register
}

bcaches() {
	random back /dev/vde && random fast /dev/vdf && cached /dev/mapper/back /dev/mapper/fast && eventually [ -d /sys/block/bcache0/bcache/cache ] &&
		random slow /dev/vdg && cached /dev/mapper/slow /dev/vdh && eventually [ -d /sys/block/bcache1/bcache/cache ] &&
		on /dev/bcache0 /cached && on /dev/bcache1 /half-cached && cat /sys/block/bcache*/bcache/state
}

multipath() {
	dmsetup create mpatha --uuid mpath-a --table '0 65536 multipath 0 0 2 1 round-robin 0 1 1 /dev/vdi 1 round-robin 0 1 1 /dev/vdj 1' &&
		format --type luks2 /dev/mapper/mpatha && open /dev/mapper/mpatha paths && on /dev/mapper/paths /paths
}

luks1() { format --type luks1 /dev/vdk && open --allow-discards /dev/vdk one && on /dev/mapper/one /luks1; }

# What was never written has no checksum, and can't be read.
sealed() {
	format --type luks2 --integrity hmac-sha256 --integrity-no-wipe /dev/vdl && open /dev/vdl sealed &&
		{ dd if=/dev/zero of=/dev/mapper/sealed bs=64k 2>/dev/null; on /dev/mapper/sealed /sealed; }
}

integrity() {
	integritysetup format -q --no-wipe /dev/vdm && integritysetup open /dev/vdm whole &&
		{ dd if=/dev/zero of=/dev/mapper/whole bs=64k 2>/dev/null; on /dev/mapper/whole /integrity; }
}

# A file system on LVM on LUKS on RAID; a snapshot of it, whose store is on a plain disk.
nested() {
	mdadm --create /dev/md0 --run --assume-clean --metadata=1.2 --level=1 --raid-devices=2 /dev/vdn /dev/vdo && format --type luks2 /dev/md0 && open /dev/md0 pv &&
		lvm pvcreate /dev/mapper/pv && lvm vgcreate vg-odd /dev/mapper/pv && lvm lvcreate -an -Zn -Wn -L 8M -n a-b vg-odd && lvm vgchange -ay vg-odd && lvm vgmknodes &&
		on /dev/mapper/vg--odd-a--b /nested
}

snapshot() { lvm pvcreate /dev/vdp && lvm vgextend vg-odd /dev/vdp && lvm lvcreate -s -an -L 4M -n snap vg-odd/a-b /dev/vdp; }

inner() { format --type luks2 /dev/vdq && open /dev/vdq outer && format --type luks2 --offset 8192 /dev/mapper/outer && open /dev/mapper/outer inner && on /dev/mapper/inner /inner; }

# Names as programs write them, and as only the kernel takes them: "raw" would be a line of the disk that /victim is on.
odd() {
	random 'odd name: 0 1' /dev/vdr && on '/dev/mapper/odd\x20name:\x200\x201' '/odd name' &&
		dmsetup create victim --table '0 8192 linear /dev/vds 0' && on /dev/mapper/victim /victim &&
		dmsetup --manglename none create "$(printf 'raw\nvictim: 0 8192 crypt aes-xts-plain64 :64:logon:x 0 %s 0' "$(cat /sys/block/vds/dev)")" --table '0 8192 linear /dev/vds 8192' &&
		dmsetup create fake --uuid CRYPT-LUKS2-00000000000000000000000000000000-fake --table '0 8192 linear /dev/vds 16384' && on /dev/mapper/fake /fake
}

# The same name twice on one disk, encrypted without and plain with a line feed at its end.
feed() {
	local feed='twin
'
	dmsetup create twin --table '0 8192 crypt aes-xts-plain64 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f 0 /dev/vds 24576' &&
		dmsetup --manglename none create "$feed" --table '0 8192 linear /dev/vds 32768' && on /dev/mapper/twin /twin && on "/dev/mapper/$feed" /feed
}

# weak NAME CIPHER KEY START: through dmsetup, which takes what cryptsetup warns of.
weak() { dmsetup create "$1" --table "0 4096 crypt $2 $3 0 /dev/vdt $4" && on "/dev/mapper/$1" "/$1"; }

ciphers() {
	local key=000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f other=202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f
	weak null cipher_null-ecb - 0 && weak ecb aes-ecb $key 4096 && weak alike aes-xts-null $key$other 8192 && weak capi 'capi:xts(aes)-plain64' $key$other 12288 &&
		weak capi-null 'capi:ecb(cipher_null)-null' - 16384 && weak short aes-xts-plain64 $key 20480
}

folders() {
	/usr/sbin/mke2fs -q -t ext4 -O encrypt /dev/vdu && mkdir -p /folders && mount -t ext4 /dev/vdu /folders && mkdir /folders/secret && head -c 32 /dev/urandom >/tmp/raw &&
		fscrypt setup --force --quiet && fscrypt setup --quiet --all-users /folders &&
		fscrypt encrypt /folders/secret --quiet --source=raw_key --name=key --key=/tmp/raw && fscrypt status /folders/secret
}

places() {
	random top /dev/vdv && on /dev/vdw /over && on /dev/mapper/top /over && mkdir -p /over/low '/over/a,b' /over/work /merged /bound &&
		mount -t overlay -o 'lowerdir=/over/low,upperdir=/over/a\,b,workdir=/over/work' overlay /merged && mount -o bind /over/low /bound
}

# A disk that is mounted in a container's namespace alone, and a file of it that the host mounts. Where the file's path
# leads to on the host, there is another one.
elsewhere() {
	mke2fs /dev/vdx >/dev/null && mkdir -p /over/hidden && touch /tmp/wait && {
		unshare -m --propagation private sh -c 'mount -t ext4 /dev/vdx /over/hidden && dd if=/dev/zero of=/over/hidden/image bs=1M count=4 && losetup /dev/loop7 /over/hidden/image && rm /tmp/wait && exec sleep 10000' >/dev/null 2>&1 &
	} && eventually [ ! -e /tmp/wait ] && on /dev/loop7 /from-elsewhere && cat /sys/block/loop7/loop/backing_file
}

# A user has namespaces of his own; what he mounts there is nobody else's.
user() {
	mke2fs /dev/vda >/dev/null && mkdir -p /plain && mount -t ext4 /dev/vda /plain && echo 'user:x:1000:1000::/:/bin/sh' >>/etc/passwd && {
		su user -c "unshare -U -r -m sh -c 'mount -t tmpfs over /plain && : >/tmp/user-is-in && exec sleep 10000'" >/tmp/user.log 2>&1 &
	} && eventually [ -e /tmp/user-is-in ]
}

try modules modules
for kind in random_swap zrams bcaches multipath luks1 sealed integrity nested snapshot inner odd feed ciphers folders places elsewhere user; do try $kind $kind; done
try tables dmsetup --manglename none table
# Of cryptsetup itself: what is the truth.
try truth sh -c 'for name in swap spill back fast one sealed pv outer inner paths; do cryptsetup status $name; done'
try check check
try record /guest/record
