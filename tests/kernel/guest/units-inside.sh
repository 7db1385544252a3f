# What units.sh became: a unit of systemd's.

says() { systemctl status --no-pager "$@"; }
told() { agent status --format json | grep -A 12 '"storage.encrypted"' | tr -d ' \n' | grep -qF "$1"; }
check() { agent status --format json; }

try first-process cat /proc/1/comm
try start systemctl start portcullis.service
try answers eventually answers
try absent eventually told '"state":"absent"'
try absent-status check
try sandbox grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/$(systemctl show -P MainPID portcullis)/status
try umount umount /plain
try verified eventually told '"status":"pass"'
try verified-status check
try stop-socket systemctl stop portcullis-storage.socket
try remount mount -t ext4 -o remount,noatime /dev/mapper/luks2 /luks2
try unasked eventually told '"status":"unknown"'
try unasked-status check
try start-socket systemctl start portcullis-storage.socket
try remount-again mount -t ext4 -o remount,relatime /dev/mapper/luks2 /luks2
try asked eventually told '"status":"pass"'
try stop systemctl stop portcullis.service
try socket systemctl is-active portcullis-storage.socket
