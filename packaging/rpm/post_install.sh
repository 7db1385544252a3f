# After installing ($1: how many versions are then installed). Enabled and not started, as with the .deb.
# The user of what speaks to the network, also in an image that is being built.
systemd-sysusers portcullis.conf
if [ "$1" -eq 1 ]; then
	systemctl --no-reload preset portcullis.service portcullis-lockdown.service >/dev/null 2>&1 || :
	if [ -d /run/systemd/system ]; then
		echo 'portcullis is installed and enabled, and not started: it denies inbound by default.'
		echo 'It goes live at the next boot, or now with: systemctl start portcullis'
	fi
fi
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || :
fi
