# Before removing ($1: how many versions are left). An upgrade stops nothing.
if [ "$1" -eq 0 ]; then
	systemctl --no-reload disable portcullis.service portcullis-lockdown.service >/dev/null 2>&1 || :
	if [ -d /run/systemd/system ]; then
		systemctl stop portcullis.service || :
	fi
fi
