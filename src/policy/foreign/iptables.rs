//! What `iptables-save` prints, as tables: for legacy iptables, which netlink does not show.
//!
//! Nothing is refused: an option that is not known makes a condition that can't be judged.
//! May not live here: running programs.

use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::{Action, Chain, Condition, Field, Rule, Table, TableFamily, ct_state};
use crate::policy::ruleset::{Family, Hook, Verdict};

/// Reads what `iptables-legacy-save` or `ip6tables-legacy-save` printed.
pub fn parse(family: Family, text: &str) -> Vec<Table> {
    let of = match family {
        Family::Ipv4 => TableFamily::Ip,
        Family::Ipv6 => TableFamily::Ip6,
    };
    let mut tables: Vec<Table> = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            tables.push(Table::new(of, name.trim(), true));
        }
        let Some(table) = tables.last_mut() else { continue };
        if let Some(declared) = line.strip_prefix(':') {
            let mut words = declared.split_whitespace();
            if let (Some(name), Some(policy)) = (words.next(), words.next()) {
                let hook = hook(&table.name, name, policy);
                let nat = table.name == "nat";
                let rules = Vec::new();
                table.chains.insert(name.to_owned(), Chain { hook, nat, rules });
            }
        }
        let words = words(line);
        // With counters (`-c`), they stand before the rule.
        let start = words.iter().position(|word| word == "-A");
        if let Some([_, chain, rest @ ..]) = start.and_then(|at| words.get(at..))
            && let Some(chain) = table.chains.get_mut(chain)
        {
            chain.rules.push(rule(family, rest));
        }
    }
    tables
}

/// Words, where quotes keep what is between them together.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut escaped) = (Vec::new(), None::<String>, false, false);
    for c in line.chars() {
        match c {
            _ if escaped => {
                word.get_or_insert_default().push(c);
                escaped = false;
            }
            '\\' if quoted => escaped = true,
            '"' => {
                word.get_or_insert_default();
                quoted = !quoted;
            }
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// `NF_INET_*` and the priorities of linux/netfilter_ipv4.h.
fn hook(table: &str, chain: &str, policy: &str) -> Option<Hook> {
    let number = match chain {
        "PREROUTING" => 0,
        "INPUT" => 1,
        "FORWARD" => 2,
        "OUTPUT" => 3,
        "POSTROUTING" => 4,
        _ => return None,
    };
    let priority = match (table, chain) {
        ("raw", _) => -300,
        ("mangle", _) => -150,
        ("nat", "PREROUTING" | "OUTPUT") => -100,
        ("nat", _) => 100,
        ("security", _) => 50,
        _ => 0,
    };
    let policy = if policy == "DROP" {
        Verdict::Drop
    } else {
        Verdict::Accept
    };
    Some(Hook {
        number,
        priority,
        policy,
    })
}

/// An option with its values, and whether a `!` stands before it.
struct Choice<'a> {
    negated: bool,
    name: &'a str,
    values: Vec<&'a str>,
}

fn choices(words: &[String]) -> Vec<Choice<'_>> {
    let mut choices: Vec<Choice<'_>> = Vec::new();
    let mut negated = false;
    for word in words {
        if word == "!" {
            negated = true;
        } else if word.starts_with('-') && word.len() > 1 && word.parse::<i64>().is_err() {
            let negated = std::mem::take(&mut negated);
            choices.push(Choice {
                negated,
                name: word,
                values: Vec::new(),
            });
        } else if let Some(last) = choices.last_mut() {
            last.values.push(word);
        }
    }
    choices
}

fn rule(family: Family, words: &[String]) -> Rule {
    let mut rule = Rule {
        handle: None,
        conditions: Vec::new(),
        action: Action::Continue,
    };
    let mut module = "";
    for choice in choices(words) {
        match (choice.name, choice.values.first().copied()) {
            ("-j", Some(target)) => {
                rule.action = action(target);
                // What follows are the target's own options.
                break;
            }
            ("-g", Some(chain)) => {
                rule.action = Action::Goto(chain.to_owned());
                break;
            }
            ("-m", Some(name)) => {
                module = name;
                // Their options decide; the others match by being there.
                let has_options = [
                    "tcp",
                    "udp",
                    "icmp",
                    "icmp6",
                    "multiport",
                    "conntrack",
                    "state",
                    "addrtype",
                    "comment",
                ];
                if !has_options.contains(&name) {
                    let unknown = || Condition::unknown(format!("-m {name}"));
                    rule.conditions
                        .push(extension_header(name).unwrap_or_else(unknown));
                }
            }
            _ => {
                let condition = condition(family, module, &choice).unwrap_or_else(|| unknown(&choice));
                rule.conditions.extend(condition);
            }
        }
    }
    rule
}

/// Matches that look into an IPv6 extension header match nothing without it, whatever they ask.
pub fn extension_header(module: &str) -> Option<Condition> {
    let number = match module {
        "hbh" => 0,
        "rt" => 43,
        "frag" => 44,
        "dst" => 60,
        _ => return None,
    };
    Some(Condition::extension_header(number))
}

fn unknown(choice: &Choice<'_>) -> Option<Condition> {
    let not = if choice.negated { "! " } else { "" };
    Some(Condition::unknown(
        format!("{not}{} {}", choice.name, choice.values.join(" ")).trim_end(),
    ))
}

/// The outer `None`: can't be judged. The inner: says nothing about the packet.
fn condition(family: Family, module: &str, choice: &Choice<'_>) -> Option<Option<Condition>> {
    let value = choice.values.first().copied();
    let condition = match (choice.name, module) {
        ("--comment", _) => return Some(None),
        ("-p", _) if value == Some("all") => return Some(None),
        ("-p", _) => Condition::is(Field::Protocol, protocol(value?)?),
        ("-i", _) => interface(value?),
        ("-s", _) => address(family, value?, true)?,
        ("-d", _) => address(family, value?, false)?,
        ("--dport", _) | ("--dports", "multiport") => ports(Field::DESTINATION_PORT, value?)?,
        ("--sport", _) | ("--sports", "multiport") => ports(Field::SOURCE_PORT, value?)?,
        ("--icmp-type" | "--icmpv6-type", _) => {
            Condition::is(Field::ICMP_TYPE, value?.parse::<u8>().ok()?.into())
        }
        ("--ctstate" | "--state", _) => Condition::any_bit(Field::CtState, states(value?)?),
        ("--dst-type", "addrtype") => Condition::is(Field::DestinationType, route_type(value?)?),
        ("--src-type", "addrtype") => Condition::is(Field::SourceType, route_type(value?)?),
        ("--tcp-flags", _) => {
            let bits = flags(choice.values.get(1)?)?;
            Condition {
                mask: flags(value?)?,
                ..Condition::is(Field::TCP_FLAGS, bits)
            }
        }
        _ => return None,
    };
    Some(Some(condition.negated_if(choice.negated)))
}

fn action(target: &str) -> Action {
    match target {
        "ACCEPT" => Action::End(Verdict::Accept, target.to_owned()),
        "RETURN" => Action::Return,
        _ => target_action(target).unwrap_or_else(|| Action::Jump(target.to_owned())),
    }
}

/// What a target of xtables does; `None` for one that is not known.
pub fn target_action(target: &str) -> Option<Action> {
    let words = target.to_owned();
    Some(match target {
        "DROP" | "REJECT" | "TARPIT" => Action::End(Verdict::Drop, words),
        "DNAT" | "REDIRECT" | "NETMAP" | "TPROXY" => Action::Translate(words),
        "QUEUE" | "NFQUEUE" | "SYNPROXY" | "STEAL" => Action::Undecided(words),
        "AUDIT" | "CHECKSUM" | "CLASSIFY" | "CONNMARK" | "CONNSECMARK" | "CT" | "DSCP" | "ECN" | "HL"
        | "HMARK" | "IDLETIMER" | "LED" | "LOG" | "MARK" | "MASQUERADE" | "NFLOG" | "NOTRACK" | "RATEEST"
        | "SECMARK" | "SET" | "SNAT" | "TCPMSS" | "TCPOPTSTRIP" | "TEE" | "TOS" | "TRACE" | "TTL"
        | "ULOG" => Action::Continue,
        _ => return None,
    })
}

fn protocol(name: &str) -> Option<u128> {
    match name {
        "icmp" => Some(1),
        "tcp" => Some(6),
        "udp" => Some(17),
        "ipv6-icmp" | "icmpv6" => Some(58),
        other => other.parse::<u8>().ok().map(u128::from),
    }
}

/// A `+` at the end stands for any rest.
fn interface(name: &str) -> Condition {
    let stem = name.strip_suffix('+');
    let mut bytes = [0; 16];
    for (place, byte) in bytes.iter_mut().zip(stem.unwrap_or(name).bytes()) {
        *place = byte;
    }
    let condition = Condition::is(Field::InterfaceName, u128::from_be_bytes(bytes));
    let bits = stem.map_or(0, |stem| 128 - 8 * stem.len().min(16));
    let mask = u128::MAX
        .checked_shl(u32::try_from(bits).unwrap_or(0))
        .unwrap_or(0);
    Condition { mask, ..condition }
}

fn address(family: Family, text: &str, source: bool) -> Option<Condition> {
    let net: IpNet = match family {
        Family::Ipv4 => text
            .parse::<Ipv4Net>()
            .map(IpNet::from)
            .or_else(|_| text.parse().map(|a: std::net::IpAddr| a.into())),
        Family::Ipv6 => text
            .parse::<Ipv6Net>()
            .map(IpNet::from)
            .or_else(|_| text.parse().map(|a: std::net::IpAddr| a.into())),
    }
    .ok()?;
    Some(in_network(net, source))
}

/// The source or destination is in this network.
pub fn in_network(net: IpNet, source: bool) -> Condition {
    match net.trunc() {
        IpNet::V4(net) => {
            let field = Field::Network(if source { 12 } else { 16 }, 4);
            Condition {
                mask: net.netmask().to_bits().into(),
                ..Condition::is(field, net.network().to_bits().into())
            }
        }
        IpNet::V6(net) => {
            let field = Field::Network(if source { 8 } else { 24 }, 16);
            Condition {
                mask: net.netmask().to_bits(),
                ..Condition::is(field, net.network().to_bits())
            }
        }
    }
}

fn ports(field: Field, list: &str) -> Option<Condition> {
    let range = |text: &str| -> Option<RangeInclusive<u128>> {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        let first: u16 = if first.is_empty() { 0 } else { first.parse().ok()? };
        let last: u16 = if last.is_empty() {
            u16::MAX
        } else {
            last.parse().ok()?
        };
        Some(first.into()..=last.into())
    };
    let ranges = list.split(',').map(range).collect::<Option<Vec<_>>>()?;
    Some(Condition::within(field, ranges))
}

/// A state that only translated flows have is no bit here: the flows that are asked about are not.
fn states(list: &str) -> Option<u128> {
    let bit = |name: &str| match name {
        "INVALID" => Some(ct_state::INVALID),
        "ESTABLISHED" => Some(ct_state::ESTABLISHED),
        "RELATED" => Some(ct_state::RELATED),
        "NEW" => Some(ct_state::NEW),
        "UNTRACKED" => Some(ct_state::UNTRACKED),
        "SNAT" | "DNAT" => Some(0),
        _ => None,
    };
    list.split(',').try_fold(0, |bits, name| Some(bits | bit(name)?))
}

/// `RTN_*` (linux/rtnetlink.h).
fn route_type(name: &str) -> Option<u128> {
    let names = ["UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST"];
    names
        .iter()
        .position(|known| *known == name)
        .and_then(|at| u128::try_from(at).ok())
}

fn flags(list: &str) -> Option<u128> {
    let bit = |name: &str| match name {
        "FIN" => Some(0x01),
        "SYN" => Some(0x02),
        "RST" => Some(0x04),
        "PSH" => Some(0x08),
        "ACK" => Some(0x10),
        "URG" => Some(0x20),
        "NONE" => Some(0),
        "ALL" => Some(0x3f),
        _ => None,
    };
    list.split(',').try_fold(0, |bits, name| Some(bits | bit(name)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAVED: &str = r#"# Generated by iptables-save v1.8.9
*filter
:INPUT DROP [0:0]
:own - [0:0]
-A INPUT -i eth+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -s 10.0.0.0/8 ! -d 10.1.0.0/16 -p tcp -m tcp --dport 80:90 -m comment --comment "it's \"mine\" -j DROP" -g own
[3:120] -A own -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m recent --update --seconds 30 -j REJECT --reject-with tcp-reset
-A own ! -s 192.0.2.7/32 -m addrtype --dst-type LOCAL -j LOG --log-prefix "-A x"
COMMIT
"#;

    fn shown(table: &Table, chain: &str) -> Vec<String> {
        table.chains[chain]
            .rules
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn rules_are_read_with_their_meaning() {
        let tables = parse(Family::Ipv4, SAVED);
        let [filter] = tables.as_slice() else {
            panic!("{tables:?}")
        };
        let hook = filter.chains["INPUT"].hook.as_ref().unwrap();
        assert_eq!((hook.number, hook.priority, hook.policy), (1, 0, Verdict::Drop));
        assert_eq!(filter.chains["own"].hook, None);
        assert_eq!(
            shown(filter, "INPUT"),
            [
                "iifname \"eth*\" ct state established,related ACCEPT",
                "ip saddr 10.0.0.0/8 ip daddr != 10.1.0.0/16 meta l4proto tcp th dport 80-90 goto own",
            ]
        );
        assert_eq!(
            shown(filter, "own"),
            [
                "meta l4proto tcp tcp flags & 0x17 2 -m recent --update --seconds 30 REJECT",
                "ip saddr != 192.0.2.7 fib daddr type local continue",
            ]
        );
    }

    proptest! {
        #[test]
        fn anything_is_read(text in "(\\*filter\n:INPUT DROP\n)?(-A INPUT( [!-~]{1,9}){0,9}\n){0,5}[ -~\n]{0,60}") {
            parse(Family::Ipv6, &text);
        }

        #[test]
        fn a_quoted_word_is_one_word(text in "[ -~]{0,30}") {
            let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
            prop_assert_eq!(words(&format!("a \"{quoted}\" b")), ["a", &text, "b"]);
        }

        #[test]
        fn what_is_not_known_is_never_decided(option in "--[a-z]{3,8}", value in "[a-z0-9]{1,5}") {
            prop_assume!(!["--dport", "--sport", "--state", "--ctstate", "--comment"].contains(&option.as_str()));
            let rule = rule(Family::Ipv4, &[option, value, "-j".into(), "DROP".into()]);
            let [condition] = rule.conditions.as_slice() else { panic!("{rule}") };
            prop_assert!(matches!(condition.field, Field::Other(_)), "{}", rule);
        }

        #[test]
        fn networks_keep_their_meaning(bits: u32, length in 0u8..=32) {
            let net = Ipv4Net::new(bits.into(), length).unwrap().trunc();
            let text = format!("*filter\n:INPUT ACCEPT\n-A INPUT -s {net} -j DROP\n");
            let tables = parse(Family::Ipv4, &text);
            prop_assert_eq!(&tables[0].chains["INPUT"].rules[0].conditions[..], [in_network(net.into(), true)]);
        }
    }
}
