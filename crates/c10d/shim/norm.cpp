#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include "guard.h"
#include "types.h"

using sgcl::guarded;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

const std::vector<int64_t> kAllButChannels{0, 2, 3};

// A column of one number a channel, as x's dimensions have it.
at::Tensor column(const at::Tensor& t, const at::Tensor& like) { return t.to(like.scalar_type()).view({1, -1, 1, 1}); }

// What a bfloat16 map is computed in.
at::Tensor wide(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

void sum_over_ranks(at::Tensor& t, const c10::intrusive_ptr<c10d::Backend>& backend) {
  std::vector<at::Tensor> tensors{t};
  TORCH_CHECK_WITH(DistBackendError, backend->allreduce(tensors)->wait(), "the collective was aborted");
}

// What ranks add up is of 64 bits, so that the square of the mean can be taken from the mean of squares.
struct SyncNorm : public torch::autograd::Function<SyncNorm> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                            at::Tensor running_mean, at::Tensor running_var, c10::intrusive_ptr<c10d::Backend> backend,
                            double momentum, double eps) {
    const auto w = wide(x);
    const int64_t channels = x.size(1);
    const auto options = x.options().dtype(at::kDouble).memory_format(std::nullopt);
    // Squares are taken from this rank's own mean: from zero, in 32 bits, a map far from it would have a variance of rounding.
    const auto here = at::full({1}, static_cast<double>(x.numel() / std::max<int64_t>(channels, 1)), options);
    const auto centre = w.sum(kAllButChannels, false, at::kDouble) / here.clamp_min(1);
    const auto squares = (w - column(centre, w)).square().sum(kAllButChannels, false, at::kDouble);
    auto sums = at::cat({centre * here, squares + here * centre * centre, here});
    sum_over_ranks(sums, backend);
    const auto count = sums.narrow(0, 2 * channels, 1);
    const auto mean = sums.narrow(0, 0, channels) / count;
    const auto var = (sums.narrow(0, channels, channels) / count - mean * mean).clamp_min(0);
    const auto inverse = (var + eps).rsqrt();
    // As BatchNorm does: the running variance is the unbiased one.
    running_mean.lerp_(mean.to(running_mean.scalar_type()), momentum);
    running_var.lerp_((var * count / (count - 1).clamp_min(1)).to(running_var.scalar_type()), momentum);
    ctx->save_for_backward({x, scale, mean, inverse, count});
    ctx->saved_data["backend"] = c10::IValue::make_capsule(backend);
    const auto slope = inverse * scale;
    return ((w - column(mean, w)) * column(slope, w) + column(shift, w)).to(x.scalar_type());
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const auto &x = saved[0], &scale = saved[1], &mean = saved[2], &inverse = saved[3], &count = saved[4];
    const auto backend = c10::static_intrusive_pointer_cast<c10d::Backend>(ctx->saved_data["backend"].toCapsule());
    const auto w = wide(x);
    const auto g = wide(gradients[0]);
    const int64_t channels = x.size(1);
    const auto normal = (w - column(mean, w)) * column(inverse, w);
    auto sums = at::cat({g.sum(kAllButChannels, false, at::kDouble), (g * normal).sum(kAllButChannels, false, at::kDouble)});
    // Scale and shift have this rank's part: the reducer averages it with the others'.
    const auto d_shift = sums.narrow(0, 0, channels).to(scale.scalar_type());
    const auto d_scale = sums.narrow(0, channels, channels).to(scale.scalar_type());
    sums = sums.clone();
    sum_over_ranks(sums, backend);
    const auto mean_g = sums.narrow(0, 0, channels) / count;
    const auto mean_gn = sums.narrow(0, channels, channels) / count;
    const auto dx = (g - column(mean_g, g) - normal * column(mean_gn, g)) * column(inverse * scale, g);
    return {dx.to(x.scalar_type()), d_scale, d_shift, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

extern "C" {

int32_t sgcl_sync_norm(void* x, void* scale, void* shift, void* running_mean, void* running_var, SgclGroup* group, double momentum,
                       double eps, void** out, char** message) {
  return guarded(message, [&] {
    const auto tensor = [](void* pointer) -> const at::Tensor& { return *static_cast<at::Tensor*>(pointer); };
    *out = new at::Tensor(SyncNorm::apply(tensor(x), tensor(scale), tensor(shift), tensor(running_mean), tensor(running_var),
                                          group->backend, momentum, eps));
  });
}

}
