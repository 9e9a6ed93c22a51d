// The C ABI between Rust and libtorch's c10d. Every function that can fail returns a status and, where it is not
// SGCL_OK, sets *message to a string that sgcl_string_free releases. No exception crosses this boundary.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct SgclStore;
struct SgclGroup;
struct SgclReducer;

enum SgclStatus : int32_t {
  SGCL_OK = 0,
  // Something was not there within its timeout.
  SGCL_TIMEOUT = 1,
  // The rendezvous store could not be reached or went away.
  SGCL_STORE = 2,
  // A connection between ranks broke.
  SGCL_BROKEN = 3,
  // Anything else libtorch refused: a dtype, a device, a layout.
  SGCL_REFUSED = 4,
};

void sgcl_string_free(char* text);

int32_t sgcl_store_listen(const char* host, uint16_t port, int64_t timeout_ms, SgclStore** out, uint16_t* bound, char** message);
int32_t sgcl_store_connect(const char* host, uint16_t port, int64_t timeout_ms, SgclStore** out, char** message);
int32_t sgcl_store_prefix(SgclStore* store, const char* prefix, SgclStore** out, char** message);
int32_t sgcl_store_set(SgclStore* store, const char* key, const uint8_t* data, size_t length, char** message);
// *data is released with sgcl_bytes_free.
int32_t sgcl_store_get(SgclStore* store, const char* key, uint8_t** data, size_t* length, char** message);
int32_t sgcl_store_wait(SgclStore* store, const char* key, int64_t timeout_ms, char** message);
int32_t sgcl_store_add(SgclStore* store, const char* key, int64_t amount, int64_t* sum, char** message);
void sgcl_bytes_free(uint8_t* data);
void sgcl_store_free(SgclStore* store);

int32_t sgcl_group_gloo(SgclStore* store, int32_t rank, int32_t world, int64_t timeout_ms, const char* address,
                        const char* interface, SgclGroup** out, char** message);
#ifdef USE_C10D_NCCL
int32_t sgcl_group_nccl(SgclStore* store, int32_t rank, int32_t world, int64_t timeout_ms, int32_t device, SgclGroup** out,
                        char** message);
#endif
// Tensors are at::Tensor*. op: 0 sum, 1 max, 2 min.
int32_t sgcl_all_reduce(SgclGroup* group, void* tensor, int32_t op, char** message);
int32_t sgcl_all_gather(SgclGroup* group, void* output, void* input, char** message);
int32_t sgcl_reduce_scatter(SgclGroup* group, void* output, void* input, char** message);
int32_t sgcl_broadcast(SgclGroup* group, void* tensor, int32_t root, char** message);
int32_t sgcl_barrier(SgclGroup* group, char** message);
int32_t sgcl_group_set_timeout(SgclGroup* group, int64_t timeout_ms, char** message);
int32_t sgcl_group_abort(SgclGroup* group, char** message);
int32_t sgcl_group_shutdown(SgclGroup* group, char** message);
void sgcl_group_free(SgclGroup* group);

int32_t sgcl_reducer_new(void** params, size_t count, SgclGroup* group, int64_t first_bucket_bytes, int64_t bucket_bytes,
                         int32_t find_unused, SgclReducer** out, char** message);
int32_t sgcl_reducer_prepare(SgclReducer* reducer, char** message);
int32_t sgcl_backward(void* loss, char** message);
void sgcl_reducer_free(SgclReducer* reducer);

// BatchNorm in training over the maps (B, C, H, W) of all ranks; *out is a new at::Tensor with its graph, tch's to free.
int32_t sgcl_sync_norm(void* x, void* scale, void* shift, void* running_mean, void* running_var, SgclGroup* group, double momentum,
                       double eps, void** out, char** message);

// A copy of a tensor of the host on a GPU, by pinned memory, queued; *out is a new at::Tensor.
int32_t sgcl_to_gpu(void* host, int32_t device, void** out, char** message);

// One step of momentum SGD over `count` parameters of one kind and device.
int32_t sgcl_sgd(void** params, void** grads, void** momenta, size_t count, double lr, double momentum, double weight_decay,
                 int32_t first, char** message);

}
