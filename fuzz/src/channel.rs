//! The channel between the process that speaks to the network and the agent, both ways. Whoever took the front over
//! can write any bytes to the agent; what the agent tells the front holds what strangers chose.
//!
//! May not live here: what the agent answers (`tests/instances/front.rs`).

use portcullis::channel::{FromFront, Lines, ToFront, line};
use portcullis::identity::caller;
use portcullis::policy::audit::chain::{GENESIS, seal};
use portcullis::policy::audit::who::Who;
use portcullis::policy::audit::{Event, MAX_LINE, Moment};
use portcullis_protocol::control::Request;
use tokio::runtime::{Builder, Runtime};

/// Longest line here: room is bounded, and a fuzzer reaches it.
const MOST: usize = 4096;

fn moment() -> Moment {
    Moment {
        time: jiff::Timestamp::UNIX_EPOCH,
        boot: "b".to_owned(),
        since_boot_ms: 0,
    }
}

/// Reads messages until one is none.
fn read(runtime: &Runtime, bytes: &[u8]) -> Vec<FromFront> {
    let mut lines = Lines::new(bytes, MOST);
    let mut messages = Vec::new();
    while let Ok(Some(message)) = runtime.block_on(lines.next::<FromFront>()) {
        messages.push(message);
    }
    messages
}

/// Messages are bounded lines, each the same after another way over the channel; nothing is read behind what is
/// no message; a spec is a checked one, and a caller's certificate can't forge a line of the audit log.
pub fn channel(data: &[u8]) -> bool {
    let runtime = Builder::new_current_thread().build().unwrap();
    let messages = read(&runtime, data);
    let mut lines = data.split(|byte| *byte == b'\n');
    for message in &messages {
        let read_from = lines.next().unwrap();
        assert!(read_from.len() <= MOST);
        let line = line(message).unwrap();
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        if line.len() <= MOST {
            assert_eq!(read(&runtime, &line).as_slice(), std::slice::from_ref(message));
        }
        if let FromFront::Call { request, remote, .. } = message {
            if let Request::Apply { spec, .. } = request {
                assert!(spec.check().is_ok());
            }
            let shown = remote.chain.first().and_then(|der| caller::read(der).ok());
            let who = Who::remote(remote.address.ip().to_string(), shown.as_ref());
            // As it gets into the audit log, and from there into the journal.
            let mut event = Event::note(moment(), "x", None);
            event.who = who;
            let sealed = seal(event, 1, GENESIS);
            assert!(sealed.line.len() <= MAX_LINE);
            let told = sealed.event.text();
            assert!(!told.contains(char::is_control), "{told:?}");
        }
    }
    !messages.is_empty()
}

/// What the agent tells the front: bounded lines, each the same after another way over the channel.
pub fn front(data: &[u8]) -> bool {
    let runtime = Builder::new_current_thread().build().unwrap();
    let read = |bytes: &[u8]| -> Vec<Vec<u8>> {
        let mut lines = Lines::new(bytes, MOST);
        let mut messages = Vec::new();
        while let Ok(Some(message)) = runtime.block_on(lines.next::<ToFront>()) {
            messages.push(line(&message).unwrap().to_vec());
        }
        messages
    };
    let messages = read(data);
    assert!(messages.len() <= data.len());
    for message in &messages {
        assert_eq!(message.iter().filter(|byte| **byte == b'\n').count(), 1);
        if message.len() <= MOST {
            assert_eq!(read(message).as_slice(), std::slice::from_ref(message));
        }
    }
    !messages.is_empty()
}
