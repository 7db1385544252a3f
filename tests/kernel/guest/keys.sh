# Key files on a disk with SELinux's labels and with quotas.

alice=/home/alice
file=$alice/.ssh/authorized_keys

# sshd is asked, not run.
sshd_is_there() {
	mkdir -p /etc/ssh
	echo 'sshd:x:101:65534::/run/sshd:/bin/false' >>/etc/passwd
	: >/etc/ssh/sshd_config
	ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
}

home() {
	echo 'alice:x:1000:1000::/home/alice:/bin/sh' >>/etc/passwd
	echo 'alice:x:1000:' >>/etc/group
	modprobe -a virtio_pci virtio_blk
	eventually [ -b /dev/vda ]
	mount -t ext4 -o usrquota /dev/vda /home
	ln -s /proc/mounts /etc/mtab
	mkdir -p $alice/.ssh
	echo '# mine' >$file
	chown -R 1000:1000 $alice
	chmod 700 $alice/.ssh
	chmod 600 $file
}

relabel() { setfattr -n security.selinux -v "system_u:object_r:$1:s0" "$2"; }
label() { getfattr --absolute-names --only-values -n security.selinux "$1" && echo; }

# What a plain replacement of a file does to its label.
replaced() {
	echo old >$alice/plain
	relabel plain_t $alice/plain
	label $alice/plain
	echo new >$alice/plain-new
	mv $alice/plain-new $alice/plain
}

as_alice() { su -s /bin/sh alice -c "$*"; }
keys() { agent apply --spec "/guest/keys-$1.json"; }

try sshd sshd_is_there
try home home
try selinux ls -d /sys/fs/selinux
try replaced replaced
try replaced-label label $alice/plain

try relabel relabel ssh_home_t $file
try daemon daemon
try first keys 1
try first-file cat $file
try first-label label $file
try first-folder ls -a $alice/.ssh
# One that was changed meanwhile is kept as well.
try relabel-again relabel user_home_t $file
try second keys 2
try second-file cat $file
try second-label label $file

try limit setquota -u alice 0 32 0 0 /home
try full-alice as_alice dd if=/dev/zero of=$alice/ballast bs=1k count=64
# Root may go on, even in alice's name.
try full-root sh -c "echo more >$alice/more && chown 1000 $alice/more"
try third keys 3
try third-status agent status --format json
try third-file cat $file
try third-label label $file
try third-folder ls -a $alice/.ssh
try raise setquota -u alice 0 0 0 0 /home
try fourth keys 4
try fourth-file cat $file
try fourth-label label $file
