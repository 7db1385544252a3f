//! Calls that the endpoint refuses by itself: the agent is told, so that its audit log has them too.
//!
//! Of operations of the control plane alone: that a stranger asked for what there is not is no news.
//! May not live here: refusing, the log.

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use portcullis_protocol::control::Request as Ask;
use tokio::sync::{mpsc, oneshot};

use super::problem::RefusedHere;
use super::server::Question;
use crate::channel::Remote;

/// Where the agent is told, and which operation it is.
pub(super) type Operation = (mpsc::Sender<Question>, &'static str);

/// Passes a request on, and tells if it was refused on the way to the agent. If the agent is busy, nobody waits
/// for that.
pub(super) async fn tell(
    State((agent, operation)): State<Operation>,
    request: Request,
    next: Next,
) -> Response {
    let remote = request.extensions().get::<Remote>().cloned();
    let response = next.run(request).await;
    if let (Some(remote), Some(RefusedHere(detail))) = (remote, response.extensions().get()) {
        let ask = Ask::CallRefused {
            operation: operation.to_owned(),
            status: response.status().as_u16(),
            detail: detail.clone(),
        };
        let (nobody_waits, _) = oneshot::channel();
        let _ = agent.try_send((ask, remote, nobody_waits));
    }
    response
}
