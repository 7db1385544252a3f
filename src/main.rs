//! The agent's program: everything is in the library, but what memory is taken from.

use std::alloc::System;
use std::process::ExitCode;

use zeroizing_alloc::ZeroAlloc;

/// Wipes each piece of the heap when it is freed. Secrets pass through libraries that copy them and do not wipe
/// (serde, hyper, rustls): `Zeroizing` can only reach our own copies.
#[global_allocator]
static HEAP: ZeroAlloc<System> = ZeroAlloc(System);

fn main() -> ExitCode {
    portcullis::cli::main()
}
