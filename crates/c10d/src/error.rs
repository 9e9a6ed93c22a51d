//! What can go wrong between ranks.

use std::ffi::{CStr, CString, c_char};

use crate::ffi;

/// A rendezvous, a collective or a reduced backward pass that failed. The group it happened on is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Something was not there within its timeout: a rank never came, hangs, or cannot be reached.
    #[error("{operation}: timed out ({message}); check that every rank of this generation runs and can be reached")]
    Timeout {
        /// What was being done.
        operation: &'static str,
        /// libtorch's words.
        message: String,
    },
    /// The rendezvous store could not be reached or went away.
    #[error("{operation}: the rendezvous store failed ({message}); check that its host, rank 0, is alive")]
    Store {
        /// What was being done.
        operation: &'static str,
        /// libtorch's words.
        message: String,
    },
    /// A connection to a peer broke: a rank died or left. Drop the group and regroup.
    #[error("{operation}: a peer is gone ({message}); drop this group and form a new one")]
    Broken {
        /// What was being done.
        operation: &'static str,
        /// libtorch's words.
        message: String,
    },
    /// The arguments do not fit: a shape, a dtype, a device, a rank out of range.
    #[error("{operation}: {message}")]
    Refused {
        /// What was being done.
        operation: &'static str,
        /// What does not fit.
        message: String,
    },
}

impl Error {
    /// True where a new group may help: a peer or the store is gone or late. False for arguments that do not fit.
    #[must_use]
    pub fn regroup_may_help(&self) -> bool {
        !matches!(self, Self::Refused { .. })
    }

    pub(crate) fn refused(operation: &'static str, message: impl Into<String>) -> Self {
        Self::Refused { operation, message: message.into() }
    }
}

/// Runs a shim call and turns its status and message into a result.
pub(crate) fn check(operation: &'static str, call: impl FnOnce(*mut *mut c_char) -> i32) -> Result<(), Error> {
    let mut text: *mut c_char = std::ptr::null_mut();
    let status = call(&raw mut text);
    if status == ffi::OK {
        return Ok(());
    }
    let message = if text.is_null() {
        "no message".to_owned()
    } else {
        // SAFETY: the shim set `text` to a NUL-terminated string that is ours to release, once.
        unsafe {
            let message = CStr::from_ptr(text).to_string_lossy().into_owned();
            ffi::sgcl_string_free(text);
            message
        }
    };
    Err(match status {
        ffi::TIMEOUT => Error::Timeout { operation, message },
        ffi::STORE => Error::Store { operation, message },
        ffi::BROKEN => Error::Broken { operation, message },
        _ => Error::Refused { operation, message },
    })
}

/// A C string, or the error that names what held the NUL byte.
pub(crate) fn c_string(operation: &'static str, text: &str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::refused(operation, format!("{text:?} holds a NUL byte")))
}

/// Milliseconds as libtorch counts them.
pub(crate) fn millis(timeout: std::time::Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX / 1_000_000)
}
