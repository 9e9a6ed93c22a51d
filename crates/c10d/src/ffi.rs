//! `shim/shim.h`, word for word.

use std::ffi::{c_char, c_void};

pub(crate) const OK: i32 = 0;
pub(crate) const TIMEOUT: i32 = 1;
pub(crate) const STORE: i32 = 2;
pub(crate) const BROKEN: i32 = 3;

#[repr(C)]
pub(crate) struct SgclStore {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct SgclGroup {
    _opaque: [u8; 0],
}

#[repr(C)]
pub(crate) struct SgclReducer {
    _opaque: [u8; 0],
}

type Message = *mut *mut c_char;

unsafe extern "C" {
    pub(crate) fn sgcl_string_free(text: *mut c_char);
    pub(crate) fn sgcl_bytes_free(data: *mut u8);

    pub(crate) fn sgcl_store_listen(
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        out: *mut *mut SgclStore,
        bound: *mut u16,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_store_connect(
        host: *const c_char,
        port: u16,
        timeout_ms: i64,
        out: *mut *mut SgclStore,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_store_prefix(
        store: *mut SgclStore,
        prefix: *const c_char,
        out: *mut *mut SgclStore,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_store_set(
        store: *mut SgclStore,
        key: *const c_char,
        data: *const u8,
        length: usize,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_store_get(
        store: *mut SgclStore,
        key: *const c_char,
        data: *mut *mut u8,
        length: *mut usize,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_store_wait(store: *mut SgclStore, key: *const c_char, timeout_ms: i64, message: Message) -> i32;
    pub(crate) fn sgcl_store_add(
        store: *mut SgclStore,
        key: *const c_char,
        amount: i64,
        sum: *mut i64,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_store_free(store: *mut SgclStore);

    pub(crate) fn sgcl_group_gloo(
        store: *mut SgclStore,
        rank: i32,
        world: i32,
        timeout_ms: i64,
        address: *const c_char,
        interface: *const c_char,
        out: *mut *mut SgclGroup,
        message: Message,
    ) -> i32;
    #[cfg(feature = "nccl")]
    pub(crate) fn sgcl_group_nccl(
        store: *mut SgclStore,
        rank: i32,
        world: i32,
        timeout_ms: i64,
        device: i32,
        out: *mut *mut SgclGroup,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_all_reduce(group: *mut SgclGroup, tensor: *mut c_void, op: i32, message: Message) -> i32;
    pub(crate) fn sgcl_all_gather(
        group: *mut SgclGroup,
        output: *mut c_void,
        input: *mut c_void,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_reduce_scatter(
        group: *mut SgclGroup,
        output: *mut c_void,
        input: *mut c_void,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_broadcast(group: *mut SgclGroup, tensor: *mut c_void, root: i32, message: Message) -> i32;
    pub(crate) fn sgcl_barrier(group: *mut SgclGroup, message: Message) -> i32;
    pub(crate) fn sgcl_group_set_timeout(group: *mut SgclGroup, timeout_ms: i64, message: Message) -> i32;
    pub(crate) fn sgcl_group_abort(group: *mut SgclGroup, message: Message) -> i32;
    pub(crate) fn sgcl_group_shutdown(group: *mut SgclGroup, message: Message) -> i32;
    pub(crate) fn sgcl_group_free(group: *mut SgclGroup);

    pub(crate) fn sgcl_reducer_new(
        params: *mut *mut c_void,
        count: usize,
        group: *mut SgclGroup,
        first_bucket_bytes: i64,
        bucket_bytes: i64,
        find_unused: i32,
        out: *mut *mut SgclReducer,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_reducer_prepare(reducer: *mut SgclReducer, message: Message) -> i32;
    pub(crate) fn sgcl_backward(loss: *mut c_void, message: Message) -> i32;
    pub(crate) fn sgcl_reducer_free(reducer: *mut SgclReducer);
    pub(crate) fn sgcl_to_gpu(host: *mut c_void, device: i32, out: *mut *mut c_void, message: Message) -> i32;
    pub(crate) fn sgcl_sync_norm(
        x: *mut c_void,
        scale: *mut c_void,
        shift: *mut c_void,
        running_mean: *mut c_void,
        running_var: *mut c_void,
        group: *mut SgclGroup,
        momentum: f64,
        eps: f64,
        out: *mut *mut c_void,
        message: Message,
    ) -> i32;
    pub(crate) fn sgcl_sgd(
        params: *mut *mut c_void,
        grads: *mut *mut c_void,
        momenta: *mut *mut c_void,
        count: usize,
        lr: f64,
        momentum: f64,
        weight_decay: f64,
        first: i32,
        message: Message,
    ) -> i32;
}

/// The `at::Tensor*` behind a tensor, as the shim takes it.
pub(crate) fn tensor(tensor: &tch::Tensor) -> *mut c_void {
    tensor.as_ptr().cast_mut().cast()
}
