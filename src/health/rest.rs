//! The rest of a body that a handler did not read, because it refused the request before.
//!
//! A connection that is closed with something unread in it is reset by the kernel, and then the answer may never
//! be seen (RFC 9112 section 9.6). So a short rest is read and thrown away before the answer is given.
//! May not live here: what is refused (`changes`).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Longest rest that is read, in bytes.
const MAX_REST: usize = 64 << 10;
/// And how long it may take.
const REST_TIME: Duration = Duration::from_secs(1);

/// A body that is given back when its reader is done with it.
pub(super) struct Lent {
    /// There until this is dropped, and so is where it goes then.
    body: Option<Incoming>,
    back: Option<oneshot::Sender<Incoming>>,
}

/// Where a lent body comes back.
pub(super) struct Rest(Option<oneshot::Receiver<Incoming>>);

/// Lends a body to a handler; if its rest is not `wanted`, it does not come back.
pub(super) fn lend(body: Incoming, wanted: bool) -> (Lent, Rest) {
    let (back, rest) = wanted.then(oneshot::channel).unzip();
    let body = Some(body);
    (Lent { body, back }, Rest(rest))
}

impl Rest {
    /// Reads what is left, if it is short and comes soon. True if nothing is left.
    pub(super) async fn read(self) -> bool {
        // Without an answer its reader still has it: nobody knows what is left.
        match self.0.and_then(|mut rest| rest.try_recv().ok()) {
            Some(body) => timeout(REST_TIME, thrown_away(body)).await.unwrap_or(false),
            None => false,
        }
    }
}

async fn thrown_away(mut body: Incoming) -> bool {
    let mut room = MAX_REST;
    while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        let Ok(frame) = frame else { return false };
        match room.checked_sub(frame.data_ref().map_or(0, Bytes::len)) {
            Some(left) => room = left,
            None => return false,
        }
    }
    true
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(body), Some(back)) = (self.body.take(), self.back.take()) {
            // Nobody wants it any more: the connection is over.
            let _ = back.send(body);
        }
    }
}

impl Body for Lent {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(Incoming::size_hint).unwrap_or_default()
    }
}
