//! Rendezvous: libtorch's `TCPStore`, and prefixes of it.

use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use crate::error::{Error, c_string, check, millis};
use crate::ffi;

/// A key-value store that all ranks of a run reach: rank 0 serves it, the others connect.
///
/// A value is a client; the server lives as long as the value [`Store::listen`] returned or a prefix of it.
#[derive(Debug)]
pub struct Store(NonNull<ffi::SgclStore>);

// SAFETY: libtorch's TCPStore and PrefixStore are used from several threads by its own process groups and lock internally.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Serves a store on `port` (0: any free one) of all interfaces and connects to it as `host`; returns it and its port.
    ///
    /// `timeout` bounds every later [`Store::get`].
    ///
    /// # Errors
    /// The port is taken, or `host` is not this machine.
    pub fn listen(host: &str, port: u16, timeout: Duration) -> Result<(Self, u16), Error> {
        let operation = "serve the rendezvous store";
        let (host, mut out, mut bound) = (c_string(operation, host)?, null_mut(), 0);
        check(operation, |message| {
            // SAFETY: pointers to live locals; `out` is set on success.
            unsafe {
                ffi::sgcl_store_listen(host.as_ptr(), port, millis(timeout), &raw mut out, &raw mut bound, message)
            }
        })?;
        Ok((Self::owned(operation, out)?, bound))
    }

    /// Connects to the store at `host:port`, trying for as long as `timeout`, which also bounds every later [`Store::get`].
    ///
    /// # Errors
    /// Nobody answers there in time.
    pub fn connect(host: &str, port: u16, timeout: Duration) -> Result<Self, Error> {
        let operation = "connect to the rendezvous store";
        let (host, mut out) = (c_string(operation, host)?, null_mut());
        check(operation, |message| {
            // SAFETY: pointers to live locals; `out` is set on success.
            unsafe { ffi::sgcl_store_connect(host.as_ptr(), port, millis(timeout), &raw mut out, message) }
        })?;
        Self::owned(operation, out)
    }

    /// The same store with all keys under `prefix`: one a generation, so that a new group never reads an old one's keys.
    ///
    /// # Errors
    /// `prefix` holds a NUL byte.
    pub fn prefix(&self, prefix: &str) -> Result<Self, Error> {
        let operation = "prefix the rendezvous store";
        let (prefix, mut out) = (c_string(operation, prefix)?, null_mut());
        check(operation, |message| {
            // SAFETY: `self` is alive; pointers to live locals; `out` is set on success.
            unsafe { ffi::sgcl_store_prefix(self.as_ptr(), prefix.as_ptr(), &raw mut out, message) }
        })?;
        Self::owned(operation, out)
    }

    /// Sets `key`.
    ///
    /// # Errors
    /// The store is gone.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<(), Error> {
        let operation = "set a key of the rendezvous store";
        let key = c_string(operation, key)?;
        check(operation, |message| {
            // SAFETY: `value` is read during the call only.
            unsafe { ffi::sgcl_store_set(self.as_ptr(), key.as_ptr(), value.as_ptr(), value.len(), message) }
        })
    }

    /// The value of `key`, waited for up to the store's timeout.
    ///
    /// # Errors
    /// Nobody sets the key in time, or the store is gone.
    pub fn get(&self, key: &str) -> Result<Vec<u8>, Error> {
        let operation = "get a key of the rendezvous store";
        let (key, mut data, mut length) = (c_string(operation, key)?, null_mut(), 0);
        check(operation, |message| {
            // SAFETY: pointers to live locals, set on success.
            unsafe { ffi::sgcl_store_get(self.as_ptr(), key.as_ptr(), &raw mut data, &raw mut length, message) }
        })?;
        // SAFETY: on success `data` holds `length` bytes that are ours to release, once.
        unsafe {
            let value = std::slice::from_raw_parts(data, length).to_vec();
            ffi::sgcl_bytes_free(data);
            Ok(value)
        }
    }

    /// Waits until somebody has set `key`.
    ///
    /// # Errors
    /// Nobody does within `timeout`, or the store is gone.
    pub fn wait(&self, key: &str, timeout: Duration) -> Result<(), Error> {
        let operation = "wait for a key of the rendezvous store";
        let key = c_string(operation, key)?;
        check(operation, |message| {
            // SAFETY: `self` and `key` outlive the call.
            unsafe { ffi::sgcl_store_wait(self.as_ptr(), key.as_ptr(), millis(timeout), message) }
        })
    }

    /// Adds to the counter `key` (absent: 0) and returns the sum.
    ///
    /// # Errors
    /// The store is gone, or the key holds no counter.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64, Error> {
        let operation = "add to a key of the rendezvous store";
        let (key, mut sum) = (c_string(operation, key)?, 0);
        check(operation, |message| {
            // SAFETY: pointers to live locals, set on success.
            unsafe { ffi::sgcl_store_add(self.as_ptr(), key.as_ptr(), amount, &raw mut sum, message) }
        })?;
        Ok(sum)
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::SgclStore {
        self.0.as_ptr()
    }

    fn owned(operation: &'static str, pointer: *mut ffi::SgclStore) -> Result<Self, Error> {
        NonNull::new(pointer).map(Self).ok_or_else(|| Error::refused(operation, "the shim returned nothing"))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the pointer is ours and is not used again.
        unsafe { ffi::sgcl_store_free(self.as_ptr()) }
    }
}
