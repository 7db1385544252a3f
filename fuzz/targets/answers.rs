//! Fuzzes `portcullis_fuzz::targets`, target `answers`. May not live here: what must hold.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    portcullis_fuzz::check("answers", data);
});
