#include <algorithm>

#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "guard.h"
#include "types.h"

using sgcl::guarded;

struct SgclReducer {
  std::unique_ptr<c10d::Reducer> reducer;
};

extern "C" {

int32_t sgcl_reducer_new(void** params, size_t count, SgclGroup* group, int64_t first_bucket_bytes, int64_t bucket_bytes,
                         int32_t find_unused, SgclReducer** out, char** message) {
  return guarded(message, [&] {
    std::vector<at::Tensor> tensors;
    for (size_t i = 0; i < count; ++i) tensors.push_back(*static_cast<at::Tensor*>(params[i]));
    c10d::verify_params_across_processes(group->group, tensors, {});
    const std::vector<bool> sparse(count, false);
    const std::vector<size_t> caps{static_cast<size_t>(first_bucket_bytes), static_cast<size_t>(bucket_bytes)};
    auto [buckets, limits] = c10d::compute_bucket_assignment_by_size(tensors, caps, sparse);
    // Gradients come last layer first, and so shall buckets.
    std::reverse(buckets.begin(), buckets.end());
    auto reducer = std::make_unique<c10d::Reducer>(
        std::move(tensors), std::move(buckets), group->group, sparse, bucket_bytes, find_unused != 0,
        /*gradient_as_bucket_view=*/true, std::unordered_map<size_t, std::string>{}, first_bucket_bytes,
        /*skip_all_reduce_unused_params=*/false, /*use_python_reducer=*/false, std::vector<int64_t>{});
    *out = new SgclReducer{std::move(reducer)};
  });
}

// What DistributedDataParallel.forward does of its reducer, in its order, without rebuilding buckets after the first step: a
// run that was resumed sums in the same order as one that was not, to the last bit.
int32_t sgcl_reducer_prepare(SgclReducer* reducer, char** message) {
  return guarded(message, [&] {
    reducer->reducer->prepare_for_forward();
    reducer->reducer->prepare_for_backward({});
  });
}

int32_t sgcl_backward(void* loss, char** message) {
  return guarded(message, [&] { static_cast<at::Tensor*>(loss)->backward(); });
}

void sgcl_reducer_free(SgclReducer* reducer) {
  sgcl::swallowed([&] {
    reducer->reducer->remove_autograd_hooks();
  });
  sgcl::swallowed([&] { delete reducer; });
}

}
