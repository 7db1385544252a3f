//! The script that user-data runs today: what all benchmarks compare with first.
//!
//! May not live here: other programs.

/// ufw for the host, and for containers the chain that Docker leaves to users. Names of bridges are those that such
/// recipes list.
pub fn recipe(tcp: &[u16], udp: &[u16]) -> String {
    let mut lines = vec![
        "set -e".to_owned(),
        "ufw --force reset".to_owned(),
        "ufw default deny incoming".to_owned(),
        "ufw default allow outgoing".to_owned(),
    ];
    lines.extend(tcp.iter().map(|port| format!("ufw allow {port}/tcp")));
    lines.extend(udp.iter().map(|port| format!("ufw allow {port}/udp")));
    lines.push("ufw --force enable".to_owned());
    // Where Docker has not made it yet.
    lines.push(
        "iptables -N DOCKER-USER 2>/dev/null && iptables -I FORWARD -j DOCKER-USER || iptables -F DOCKER-USER".to_owned(),
    );
    let mut chain = [
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-i lo -j ACCEPT",
        "-i docker0 ! -o docker0 -j ACCEPT",
        "-i br+ ! -o br+ -j ACCEPT",
        "-i cni+ -j ACCEPT",
        "-i cali+ -j ACCEPT",
        "-i flannel+ -j ACCEPT",
        "-s 10.42.0.0/16 -j ACCEPT",
        "-s 10.43.0.0/16 -j ACCEPT",
    ]
    .map(str::to_owned)
    .to_vec();
    chain.extend(tcp.iter().map(|port| format!("-p tcp --dport {port} -j ACCEPT")));
    chain.push("-j DROP".to_owned());
    lines.extend(chain.iter().map(|rule| format!("iptables -A DOCKER-USER {rule}")));
    lines.join("\n")
}
