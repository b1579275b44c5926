//! What AddressSanitizer must be told of memory that the host device gives out in pieces. Empty in other builds.

#[cfg(dilt_sanitize = "address")]
unsafe extern "C" {
    fn __asan_poison_memory_region(address: *const std::ffi::c_void, bytes: usize);
    fn __asan_unpoison_memory_region(address: *const std::ffi::c_void, bytes: usize);
}

/// UndefinedBehaviorSanitizer asks for its options: whoever called what it reports is named too, since loads are inlined.
#[cfg(dilt_sanitize = "address")]
#[unsafe(no_mangle)]
extern "C" fn __ubsan_default_options() -> *const std::ffi::c_char {
    c"print_stacktrace=1".as_ptr()
}

/// Reports every later use of these bytes, until they are freed or unpoisoned.
#[cfg_attr(not(dilt_sanitize = "address"), expect(unused_variables))]
pub(super) fn poison(address: u64, bytes: usize) {
    #[cfg(dilt_sanitize = "address")]
    // SAFETY: the bytes are part of an allocation that the caller owns; nothing is read or written.
    unsafe {
        __asan_poison_memory_region(address as *const _, bytes);
    }
}

/// Allows the use of these bytes again: of a stack that was abandoned, say, whose frames left their red zones there.
#[cfg_attr(not(dilt_sanitize = "address"), expect(unused_variables))]
pub(super) fn unpoison(address: u64, bytes: usize) {
    #[cfg(dilt_sanitize = "address")]
    // SAFETY: as in `poison`.
    unsafe {
        __asan_unpoison_memory_region(address as *const _, bytes);
    }
}
