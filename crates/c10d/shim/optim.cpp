#include <ATen/ATen.h>

#include "guard.h"

using sgcl::guarded;

namespace {

std::vector<at::Tensor> list(void** tensors, size_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (size_t i = 0; i < count; ++i) out.push_back(*static_cast<at::Tensor*>(tensors[i]));
  return out;
}

}  // namespace

extern "C" {

int32_t sgcl_sgd(void** params, void** grads, void** momenta, size_t count, double lr, double momentum, double weight_decay,
                 int32_t first, char** message) {
  return guarded(message, [&] {
    at::_fused_sgd_(list(params, count), list(grads, count), list(momenta, count), weight_decay, momentum, lr, /*dampening=*/0.0,
                    /*nesterov=*/false, /*maximize=*/false, /*is_first_step=*/first != 0);
  });
}

}
