//! Talking netlink: open, send, dump, receive; for nftables, links and routes alike.
//!
//! May not live here: what messages mean.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlaBuffer, NlasIterator,
};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use socket2::{SockFilter, SockRef};

/// Larger than any datagram that the kernel sends (dumps are built in pages of at most 32 KiB).
const RECEIVE_BYTES: usize = 1 << 16;

/// How often a dump is tried again when the kernel says that what it dumped changed meanwhile.
const DUMP_TRIES: usize = 5;

/// Length of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;

/// The kernel answers at once; a question that it does not understand must not hang the daemon.
const ANSWER_TIME: TimeVal = TimeVal::new(5, 0);

/// `MSG_DONTWAIT` (linux/socket.h).
pub const DONTWAIT: i32 = 0x40;

/// Length of `struct nfgenmsg`, the header of all nfnetlink messages (linux/netfilter/nfnetlink.h).
pub const GENMSG: usize = 4;

/// Classic BPF (linux/filter.h): load the word at an offset, compare it, give so many bytes of the datagram.
const LOAD_WORD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// Where `struct nlmsghdr` has the sender's number.
const NLMSG_PID: u32 = 12;

/// A netlink socket of one protocol family.
pub struct Connection {
    socket: Socket,
    sequence: u32,
    port: u32,
}

/// What the kernel answered to one message of a batch.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Sequence number of the message.
    pub sequence: u32,
    /// Errno; 0 for an acknowledgement.
    pub errno: i32,
}

impl Connection {
    /// Opens a socket of a `NETLINK_*` family and joins multicast groups.
    ///
    /// # Errors
    /// As socket(2) and bind(2): `EPROTONOSUPPORT` when the kernel lacks the family.
    pub fn open(family: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Self::over(socket)
    }

    /// A connection over a socket that is bound already. What is left in it is thrown away.
    ///
    /// # Errors
    /// As setsockopt(2) and getsockname(2).
    pub fn over(socket: Socket) -> io::Result<Self> {
        // A refusal comes without the message that it is about: those of a large batch would fill the queue.
        socket.set_cap_ack(true)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &ANSWER_TIME)?;
        let mut address = SocketAddr::new(0, 0);
        socket.get_address(&mut address)?;
        let connection = Self {
            socket,
            sequence: 1,
            port: address.port_number(),
        };
        let _ = connection.drain();
        Ok(connection)
    }

    /// The number by which the kernel knows this socket (`nlmsg_pid`).
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next free sequence number.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Lets the kernel queue so many bytes for us, as far as it lets us.
    pub fn reserve(&self, bytes: usize) {
        let _ = setsockopt(&self.socket, sockopt::RcvBufForce, &bytes);
    }

    /// Has the kernel leave out what follows from changes over the connection of that number: events of
    /// 100,000 elements would fill the queue and push out what others did.
    ///
    /// # Errors
    /// As setsockopt(2) with `SO_ATTACH_FILTER`.
    pub fn ignore(&self, port: u32) -> io::Result<()> {
        // A datagram has messages of one sender only. The filter reads in network order.
        let sender = u32::from_be_bytes(port.to_ne_bytes());
        let filter = [
            SockFilter::new(LOAD_WORD, 0, 0, NLMSG_PID),
            SockFilter::new(JUMP_IF_EQUAL, 0, 1, sender),
            SockFilter::new(RETURN, 0, 0, 0),
            SockFilter::new(RETURN, 0, 0, u32::MAX),
        ];
        SockRef::from(&self.socket).attach_filter(&filter)
    }

    /// Makes reads return `WouldBlock` instead of waiting, for use with an event loop.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_non_blocking(true)
    }

    /// Asks for a dump and gives its messages.
    ///
    /// # Errors
    /// The kernel's errno, or `InvalidData` for an answer that is not understood.
    pub fn dump<T>(&mut self, message: &T) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        for _ in 0..DUMP_TRIES {
            if let Some(messages) = self.ask(message, NLM_F_DUMP)? {
                return Ok(messages);
            }
        }
        Err(io::Error::new(
            io::ErrorKind::Interrupted,
            "what was dumped kept changing",
        ))
    }

    /// Asks for a dump and hands over its messages one by one, until `take` breaks off; then the rest
    /// is still on its way, and the connection is of no more use.
    ///
    /// # Errors
    /// The kernel's errno; `Interrupted` when what was dumped changed meanwhile.
    pub fn each(
        &mut self,
        message: &RawMessage,
        mut take: impl FnMut(&RawMessage) -> ControlFlow<()>,
    ) -> io::Result<()> {
        let sequence = self.next_sequence();
        self.socket
            .send(&encode(message.clone(), sequence, NLM_F_REQUEST | NLM_F_DUMP), 0)?;
        loop {
            for answer in self.receive::<RawMessage>(0)? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                if answer.header.flags & NLM_F_DUMP_INTR != 0 {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) if take(&inner).is_break() => return Ok(()),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(()),
                    _ => {}
                }
            }
        }
    }

    /// Asks one question and gives the answers to it.
    ///
    /// # Errors
    /// As [`Self::dump`].
    pub fn get<T>(&mut self, message: &T) -> io::Result<Vec<T>>
    where
        T: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        Ok(self.ask(message, NLM_F_ACK)?.unwrap_or_default())
    }

    /// `None` when a dump was not of one moment.
    fn ask<T>(&mut self, message: &T, flags: u16) -> io::Result<Option<Vec<T>>>
    where
        T: NetlinkSerializable + NetlinkDeserializable + Clone,
    {
        let sequence = self.next_sequence();
        let bytes = encode(message.clone(), sequence, NLM_F_REQUEST | flags);
        self.socket.send(&bytes, 0)?;
        let (mut found, mut consistent) = (Vec::new(), true);
        loop {
            for answer in self.receive::<T>(0)? {
                if answer.header.sequence_number != sequence {
                    continue;
                }
                consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    // The end of a dump, or the acknowledgement of a question.
                    NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => {
                        return Ok(consistent.then_some(found));
                    }
                    NetlinkPayload::Overrun(_) => consistent = false,
                    _ => {}
                }
            }
        }
    }

    /// Sends a batch in one piece and gives all answers that the kernel made to it. Netlink works a
    /// batch off before send(2) returns, so every answer is there by then.
    ///
    /// # Errors
    /// As send(2), `EMSGSIZE` and `ENOBUFS` included.
    pub fn send_batch<T>(&mut self, batch: &[u8]) -> io::Result<Vec<Answer>>
    where
        T: NetlinkSerializable + NetlinkDeserializable,
    {
        // The kernel doubles the value; a batch has to fit whole. Without CAP_NET_ADMIN over the
        // limits this fails, and send(2) then says whether it mattered.
        let _ = setsockopt(&self.socket, sockopt::SndBufForce, &batch.len().max(1 << 16));
        let _ = setsockopt(&self.socket, sockopt::RcvBufForce, &(1 << 20));
        self.socket.send(batch, 0)?;
        let mut answers = Vec::new();
        loop {
            match self.receive::<T>(DONTWAIT) {
                Ok(messages) => answers.extend(messages.into_iter().filter_map(|message| {
                    let NetlinkPayload::Error(error) = message.payload else {
                        return None;
                    };
                    Some(Answer {
                        sequence: message.header.sequence_number,
                        errno: error.raw_code().abs(),
                    })
                })),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answers),
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives one datagram's messages.
    ///
    /// # Errors
    /// As recv(2); `ENOBUFS` means that events were lost.
    pub fn receive<T: NetlinkDeserializable + NetlinkSerializable>(
        &self,
        flags: i32,
    ) -> io::Result<Vec<NetlinkMessage<T>>> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        let length = self.socket.recv(&mut buffer, flags)?;
        if length > buffer.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a netlink datagram was too large",
            ));
        }
        messages(&buffer)
    }

    /// Takes all datagrams that are there, without looking at them: for who only wants to know that
    /// something happened. Lost events (`ENOBUFS`) are something that happened.
    ///
    /// # Errors
    /// As recv(2): `WouldBlock` when nothing is there.
    pub fn drain(&self) -> io::Result<()> {
        let mut any = false;
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
            match self.socket.recv(&mut buffer, DONTWAIT) {
                Ok(_) => any = true,
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => any = true,
                Err(error) if any && error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// The messages of one datagram.
///
/// # Errors
/// `InvalidData` for what is no message.
pub fn messages<T: NetlinkDeserializable + NetlinkSerializable>(
    datagram: &[u8],
) -> io::Result<Vec<NetlinkMessage<T>>> {
    let (mut rest, mut messages) = (datagram, Vec::new());
    while rest.len() >= HEADER_BYTES {
        let message = NetlinkMessage::<T>::deserialize(rest)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        let step = (message.header.length as usize).next_multiple_of(4);
        rest = rest.get(step..).unwrap_or_default();
        messages.push(message);
    }
    Ok(messages)
}

/// A message whose payload is left as bytes.
#[derive(Clone, Debug)]
pub struct RawMessage {
    kind: u16,
    payload: Vec<u8>,
}

impl RawMessage {
    /// A message to be sent.
    pub fn new(kind: u16, payload: Vec<u8>) -> Self {
        Self { kind, payload }
    }

    /// Of a typed message that is to be sent.
    pub fn of<T: NetlinkSerializable>(message: &T) -> Self {
        let mut payload = vec![0; message.buffer_len()];
        message.serialize(&mut payload);
        Self::new(message.message_type(), payload)
    }

    /// The message's type; of nfnetlink, the subsystem and its own type, a byte each.
    pub fn kind(&self) -> u16 {
        self.kind
    }

    /// The family's own header, and the attributes behind it.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }
}

/// Attributes one after the other, up to the first that is none.
pub struct Attributes<'a>(NlasIterator<&'a [u8]>);

impl<'a> Attributes<'a> {
    /// The attributes behind a header of that many bytes.
    pub fn behind(bytes: &'a [u8], header: usize) -> Self {
        Self(NlasIterator::new(bytes.get(header..).unwrap_or_default()))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = NlaBuffer<&'a [u8]>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()?.ok()
    }
}

/// Adds an attribute (`struct nlattr` and its value), padded to four bytes.
pub fn add_attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

/// The host-endian number at an offset.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

impl NetlinkSerializable for RawMessage {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.payload.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.payload);
    }
}

impl NetlinkDeserializable for RawMessage {
    type Error = std::convert::Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self {
            kind: header.message_type,
            payload: payload.to_vec(),
        })
    }
}

/// One message with its header, as it goes over the socket.
pub fn encode<T: NetlinkSerializable>(message: T, sequence: u32, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(message));
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
