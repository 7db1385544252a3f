# The gate on this kernel: shut, kept, changed, asked about.

table() { nft -s list table inet portcullis; }

# Sets and elements come in any order; whether the rules are in theirs, the report says.
held() { table | tr -s ' ,\t' '\n' | sort; }
is_back() { held | cmp -s - /tmp/held; }

# disturb NAME COMMAND...: somebody else's change, which has to be undone.
disturb() {
	local name=$1
	shift
	try "$name" "$@"
	try "$name-undone" eventually is_back
	try "$name-status" agent status --format json
}

# A table's owner would be listed.
owned() { printf '%s\n' 'add table inet owned { flags owner; }' 'list table inet owned' | nft -i; }

explain() { agent explain --format json --protocol tcp "$@"; }

listen 22 80
knocks open
try owned owned

try lockdown agent lockdown
try lockdown-table table
knocks lockdown

try daemon daemon
try apply agent apply --spec /guest/rich.json
knocks rules
try rules-table table
for port in 22 80; do
	try explain-$port explain --from 10.9.0.2 --port $port
	try explain-$port-ipv6 explain --from fd09::2 --port $port
done
try explain-interval explain --from 192.0.2.129 --port 80
try explain-peer explain --from 10.0.0.3 --port 80
try explain-outside explain --from 192.0.2.200 --port 80
# Kernels differ in what they take for an overlap.
sed 's/"generation": 1/"generation": 2/; s|192.0.2.128/26|192.0.2.128/25|' /guest/rich.json >/tmp/ranges.json
try ranges agent apply --spec /tmp/ranges.json
try explain-inside explain --from 192.0.2.200 --port 80

held >/tmp/held
disturb flush nft flush ruleset
disturb delete nft delete table inet portcullis
disturb insert nft insert rule inet portcullis gate accept
disturb element nft add element inet portcullis peers4 '{ 10.9.0.2 }'
knocks undone

try add agent firewall add --id web --protocol tcp --port 80 --source 10.9.0.0/24
try added-80 knock 10.9.0.1 80
try revoke agent firewall revoke web
try revoked-80 knock 10.9.0.1 80

# The next daemon finds what it wants: counters go on.
try count-before agent firewall denied --format json
kill -9 $daemon
try next-daemon daemon
try count-after agent firewall denied --format json

peers=$(seq 0 2999 | awk '{
	printf "%s{\"instance\": \"p%d\", \"addresses\": [\"10.1.%d.%d\"]}", comma, $1, $1 / 256, $1 % 256; comma = ","
}')
cat >/tmp/many.json <<END
{"version": 1, "generation": 9, "instance": {"id": "i-old"}, "cluster": {"id": "c", "peers": [$peers]}}
END
try many agent apply --spec /tmp/many.json --force
try many-status agent status --format json
held >/tmp/held
disturb many-flush nft flush ruleset

try memory grep -E '^Vm(RSS|HWM)' /proc/$daemon/status
