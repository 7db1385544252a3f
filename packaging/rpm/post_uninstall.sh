# After removing ($1: how many versions are left). Removing the package removes the gate, as with the .deb.
if [ -d /run/systemd/system ]; then
	systemctl daemon-reload || :
	if [ "$1" -ge 1 ]; then
		systemctl try-restart portcullis.service || :
	elif command -v nft >/dev/null; then
		if nft list table inet portcullis >/dev/null 2>&1; then
			nft delete table inet portcullis
			echo 'portcullis: the firewall rules are removed; inbound is no longer denied'
		fi
	else
		echo 'portcullis: firewall rules that were applied stay until the next boot.' >&2
		echo 'To remove them now: install nftables, then nft delete table inet portcullis' >&2
	fi
fi
