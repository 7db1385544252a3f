//! `portcullisctl`: hands the arguments to the library and its answer to the shell.
//!
//! May not live here: anything else.

fn main() -> std::process::ExitCode {
    portcullis_provision::cli::main()
}
