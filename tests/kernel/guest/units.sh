# Under systemd: the daemon in its sandbox, and the unit that it asks how devices are encrypted.

. /guest/luks.sh
try disks disks
try luks2-partitions partitions
try luks2 luks2

mkdir -p /etc/systemd/system /etc/portcullis /usr/bin
ln -s /bin/portcullis /usr/bin/portcullis
cp /guest/units/* /etc/systemd/system/
cp /guest/portcullis.toml /etc/portcullis/
echo ID=test >/etc/os-release
: >/etc/machine-id
cat >/etc/systemd/system/test.service <<-END
	[Unit]
	DefaultDependencies=no
	[Service]
	Type=oneshot
	StandardOutput=file:/dev/console
	StandardError=file:/dev/console
	ExecStart=/bin/sh /init units-inside
END
printf '[Unit]\nWants=test.service\nDefaultDependencies=no\n' >/etc/systemd/system/default.target
# They are systemd's to mount.
umount /run/netns/stranger /run/netns /run /tmp
exec /lib/systemd/systemd --log-target=kmsg --show-status=no
