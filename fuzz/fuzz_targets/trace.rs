#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| limosa_fuzz_targets::trace::run(data));
