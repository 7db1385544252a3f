# A change on trial, and then the power goes.

listen 22 80
try disk disk
try lockdown agent lockdown
try daemon daemon
try accepted agent apply --spec /guest/accepted.json
try trial agent apply --spec /guest/trial.json --confirm 1h
knocks trial
# What nobody synchronised shows afterwards that the power was really gone.
echo >/var/lib/portcullis/unsynchronised
kill -9 $daemon
knocks killed
try files ls /var/lib/portcullis
try cut true
sleep 600
