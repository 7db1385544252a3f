# The boot after the power cut.

listen 22 80
try disk disk
try files ls /var/lib/portcullis
knocks open
try lockdown agent lockdown
knocks lockdown
try daemon daemon
try status agent status --format json
knocks daemon
try files-then ls /var/lib/portcullis
