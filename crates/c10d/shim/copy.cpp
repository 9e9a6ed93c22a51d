#include <ATen/ATen.h>

#include "guard.h"

using sgcl::guarded;

extern "C" {

// tch can pin memory only with an argument that libtorch warns of at every call.
int32_t sgcl_to_gpu(void* host, int32_t device, void** out, char** message) {
  return guarded(message, [&] {
    const at::Device gpu(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    *out = new at::Tensor(static_cast<at::Tensor*>(host)->pin_memory().to(gpu, /*non_blocking=*/true));
  });
}

}
