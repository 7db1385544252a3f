//! Launches instances, hands them their spec, waits until they are proven ready, and changes them
//! afterwards: the control plane's side of portcullis.

#![forbid(unsafe_code)]
