//! OpenSlide's functions, found once in the library that is installed.

use std::ffi::{c_char, c_int};
use std::sync::OnceLock;

use libloading::Library;

use crate::OpenSlideError;

/// `openslide_t`.
#[repr(C)]
pub(crate) struct Handle {
    private: [u8; 0],
}

/// OpenSlide 4, then 3.4: what is used here is the same in both.
const NAMES: [&str; 2] = if cfg!(target_os = "macos") {
    ["libopenslide.1.dylib", "libopenslide.0.dylib"]
} else {
    ["libopenslide.so.1", "libopenslide.so.0"]
};

macro_rules! functions {
    ($($name:ident: $type:ty),* $(,)?) => {
        /// The functions, as <https://openslide.org/api/openslide_8h.html> declares them.
        #[derive(Debug)]
        pub(crate) struct Api {
            $(pub(crate) $name: $type,)*
        }

        impl Api {
            fn find(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: the type is the one that OpenSlide's header declares. The library stays loaded for ever.
                        $name: unsafe { *library.get::<$type>(concat!("openslide_", stringify!($name), "\0").as_bytes())? },
                    )*
                })
            }
        }
    };
}

functions! {
    detect_vendor: unsafe extern "C" fn(*const c_char) -> *const c_char,
    open: unsafe extern "C" fn(*const c_char) -> *mut Handle,
    close: unsafe extern "C" fn(*mut Handle),
    get_error: unsafe extern "C" fn(*mut Handle) -> *const c_char,
    get_level_count: unsafe extern "C" fn(*mut Handle) -> c_int,
    get_level_dimensions: unsafe extern "C" fn(*mut Handle, c_int, *mut i64, *mut i64),
    get_level_downsample: unsafe extern "C" fn(*mut Handle, c_int) -> f64,
    get_property_value: unsafe extern "C" fn(*mut Handle, *const c_char) -> *const c_char,
    read_region: unsafe extern "C" fn(*mut Handle, *mut u32, i64, i64, c_int, i64, i64),
}

impl Api {
    /// Looks for the library the first time; that it is not there is remembered too.
    pub(crate) fn get() -> Result<&'static Self, OpenSlideError> {
        static API: OnceLock<Result<Api, OpenSlideError>> = OnceLock::new();
        API.get_or_init(|| load(&NAMES)).as_ref().map_err(Clone::clone)
    }
}

fn load(names: &[&str]) -> Result<Api, OpenSlideError> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: OpenSlide and what it needs do nothing when they are loaded but prepare themselves.
        match unsafe { Library::new(name) } {
            Ok(library) => {
                let found = Api::find(&library).map_err(|error| OpenSlideError::Missing(format!("{name}: {error}")));
                // Its functions are called until the process ends.
                std::mem::forget(library);
                return found;
            }
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(OpenSlideError::Missing(reasons.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_is_named_with_the_package_to_install() {
        let error = load(&["libopenslide-of-nobody.so.7"]).map(drop).map_err(|error| error.to_string());
        let said = error.err().unwrap_or_default();
        assert!(said.contains("libopenslide-of-nobody.so.7") && said.contains("libopenslide0"), "{said}");
    }

    #[test]
    fn a_library_that_is_another_one_is_refused_by_the_function_it_lacks() {
        let name = if cfg!(target_os = "macos") { "libSystem.dylib" } else { "libc.so.6" };
        let said = load(&[name]).map(drop).map_err(|error| error.to_string()).err().unwrap_or_default();
        assert!(said.contains("openslide_detect_vendor"), "{said}");
    }
}
