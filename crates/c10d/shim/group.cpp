#include <ATen/core/grad_mode.h>
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <gloo/common/error.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "guard.h"
#include "types.h"

using sgcl::guarded;
using std::chrono::milliseconds;

namespace gloo::transport::tcp {
// Neither its layout nor its header is needed: its functions, which libtorch_cpu.so exports, take it by its address.
class UnboundBuffer {
 public:
  bool waitSend(int* rank, std::chrono::milliseconds timeout);
  bool waitRecv(int* rank, std::chrono::milliseconds timeout);
  void signalException(std::exception_ptr exception);
};
}  // namespace gloo::transport::tcp

namespace {

using gloo::transport::tcp::UnboundBuffer;

// What collectives of this process wait for. Closing a connection, or its failure, does not end every wait: not of a send in flight that
// the peer has stopped reading, nor of what begins later. Those would last until their timeout. A process is in one ring at a time, so
// all waits are of the group that is aborted.
std::mutex waits_mutex;
std::unordered_set<UnboundBuffer*> waits;
bool aborted = false;

std::exception_ptr abortion() {
  return std::make_exception_ptr(::gloo::IoException("Connection closed: this process aborted the group"));
}

class Wait {
 public:
  explicit Wait(UnboundBuffer* buffer) : buffer_(buffer) {
    std::lock_guard<std::mutex> lock(waits_mutex);
    if (aborted) std::rethrow_exception(abortion());
    waits.insert(buffer_);
  }
  ~Wait() {
    std::lock_guard<std::mutex> lock(waits_mutex);
    waits.erase(buffer_);
  }
  // libtorch's own function, behind ours of the same name.
  bool as(const char* name, int* rank, milliseconds timeout) const {
    using Function = bool (*)(UnboundBuffer*, int*, milliseconds);
    const auto function = reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
    TORCH_CHECK(function != nullptr, "libtorch_cpu.so has no gloo that this was built for: ", name);
    return function(buffer_, rank, timeout);
  }

 private:
  UnboundBuffer* buffer_;
};

// ProcessGroupGloo inherits an abort() that does nothing. Closing the connections frees the peers, ending the waits this process.
class Gloo : public c10d::ProcessGroupGloo {
 public:
  using c10d::ProcessGroupGloo::ProcessGroupGloo;
  void abort() override {
    for (auto& context : contexts_) context->closeConnections();
    std::lock_guard<std::mutex> lock(waits_mutex);
    aborted = true;
    for (auto* buffer : waits) buffer->signalException(abortion());
  }
};

#ifdef USE_C10D_NCCL
// Collectives over NCCL are queued on the device and return at once. One that is aborted leaves the queue like one that is through, with
// whatever is in its output, and libtorch's work says nothing of it: what a rank makes of that would be handed to the others as the newest
// state. So a collective is waited for here, and nobody but us aborts.
class Nccl : public c10d::ProcessGroupNCCL {
 public:
  using c10d::ProcessGroupNCCL::ProcessGroupNCCL;

  // Returns once no kernel of the communicator runs any more, whoever began it.
  void abort() override {
    // Before any kernel ends by it.
    aborted_ = true;
    std::call_once(abort_, [this] { c10d::ProcessGroupNCCL::abort(); });
  }

  void shutdown() override {
    left_ = true;
    c10d::ProcessGroupNCCL::shutdown();
  }

  // Returns once the collective, and with it all that was queued before, has happened on the device. A communicator that is aborted stays
  // so: an output that nobody waited for on the host, such as the reducer's, is sound if a later collective is.
  void finish(const c10::intrusive_ptr<c10d::Work>& work) {
    const auto began = std::chrono::steady_clock::now();
    while (!work->isCompleted() && !aborted_) {
      // Most take microseconds. Whoever waits for another rank leaves the core to those that decode.
      if (std::chrono::steady_clock::now() - began < std::chrono::milliseconds(1)) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      }
    }
    const auto failure = work->exception();
    if (failure || aborted_) {
      // What is still queued ends before its memory is given to others.
      abort();
      if (failure) std::rethrow_exception(failure);
      TORCH_CHECK_WITH(DistBackendError, false, "the NCCL communicator was aborted by this process");
    }
    work->wait();
  }

  // Gives the communicator back, in good order; a destructor would not.
  void leave() {
    if (!aborted_ && !left_) shutdown();
  }

 private:
  std::atomic<bool> aborted_{false};
  std::atomic<bool> left_{false};
  std::once_flag abort_;
};
#endif

at::Tensor& tensor(void* pointer) { return *static_cast<at::Tensor*>(pointer); }

void finish(const c10::intrusive_ptr<c10d::Backend>& backend, const c10::intrusive_ptr<c10d::Work>& work) {
#ifdef USE_C10D_NCCL
  if (auto* nccl = dynamic_cast<Nccl*>(backend.get())) return nccl->finish(work);
#endif
  TORCH_CHECK_WITH(DistBackendError, work->wait(), "the collective was aborted");
}

SgclGroup* group_of(const c10::intrusive_ptr<c10d::Store>& store, int32_t rank, int32_t world, c10::DeviceType device,
                    c10d::ProcessGroup::BackendType type, c10::intrusive_ptr<c10d::Backend> backend) {
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, world);
  group->setBackend(device, type, backend);
  group->setDefaultBackend(type);
  return new SgclGroup{std::move(group), std::move(backend)};
}

}  // namespace

// These stand before libtorch's own: the virtual functions of every buffer are these.
bool UnboundBuffer::waitSend(int* rank, milliseconds timeout) {
  return Wait(this).as("_ZN4gloo9transport3tcp13UnboundBuffer8waitSendEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE", rank,
                       timeout);
}

bool UnboundBuffer::waitRecv(int* rank, milliseconds timeout) {
  return Wait(this).as("_ZN4gloo9transport3tcp13UnboundBuffer8waitRecvEPiNSt6chrono8durationIlSt5ratioILl1ELl1000EEEE", rank,
                       timeout);
}

extern "C" {

int32_t sgcl_group_gloo(SgclStore* store, int32_t rank, int32_t world, int64_t timeout_ms, const char* address,
                        const char* interface, SgclGroup** out, char** message) {
  return guarded(message, [&] {
    auto options = c10d::ProcessGroupGloo::Options::create(milliseconds(timeout_ms));
    options->devices.push_back(interface != nullptr ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                                                    : c10d::ProcessGroupGloo::createDeviceForHostname(address));
    {
      std::lock_guard<std::mutex> lock(waits_mutex);
      aborted = false;
    }
    auto backend = c10::make_intrusive<Gloo>(store->store, rank, world, options);
    *out = group_of(store->store, rank, world, c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, backend);
  });
}

#ifdef USE_C10D_NCCL
int32_t sgcl_group_nccl(SgclStore* store, int32_t rank, int32_t world, int64_t timeout_ms, int32_t device, SgclGroup** out,
                        char** message) {
  return guarded(message, [&] {
    // The default takes the process down where a communicator breaks, and regrouping happens in process; to have libtorch's watchdog abort
    // it instead would leave garbage in outputs unseen.
    setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", 1);
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = milliseconds(timeout_ms);
    auto backend = c10::make_intrusive<Nccl>(store->store, rank, world, options);
    backend->setBoundDeviceId(at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(device)));
    *out = group_of(store->store, rank, world, c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, backend);
  });
}
#endif

int32_t sgcl_all_reduce(SgclGroup* group, void* pointer, int32_t op, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    c10d::AllreduceOptions options;
    options.reduceOp = op == 0 ? c10d::ReduceOp::SUM : op == 1 ? c10d::ReduceOp::MAX : c10d::ReduceOp::MIN;
    std::vector<at::Tensor> tensors{tensor(pointer)};
    finish(group->backend, group->backend->allreduce(tensors, options));
  });
}

int32_t sgcl_all_gather(SgclGroup* group, void* output, void* input, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    finish(group->backend, group->backend->_allgather_base(tensor(output), tensor(input)));
  });
}

int32_t sgcl_reduce_scatter(SgclGroup* group, void* output, void* input, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    finish(group->backend, group->backend->_reduce_scatter_base(tensor(output), tensor(input)));
  });
}

int32_t sgcl_broadcast(SgclGroup* group, void* pointer, int32_t root, char** message) {
  return guarded(message, [&] {
    at::NoGradGuard no_grad;
    c10d::BroadcastOptions options;
    options.rootRank = root;
    std::vector<at::Tensor> tensors{tensor(pointer)};
    finish(group->backend, group->backend->broadcast(tensors, options));
  });
}

int32_t sgcl_barrier(SgclGroup* group, char** message) {
  return guarded(message, [&] { finish(group->backend, group->backend->barrier()); });
}

int32_t sgcl_group_set_timeout(SgclGroup* group, int64_t timeout_ms, char** message) {
  return guarded(message, [&] { group->backend->setTimeout(milliseconds(timeout_ms)); });
}

int32_t sgcl_group_abort(SgclGroup* group, char** message) {
  return guarded(message, [&] { group->backend->abort(); });
}

int32_t sgcl_group_shutdown(SgclGroup* group, char** message) {
  return guarded(message, [&] { group->backend->shutdown(); });
}

void sgcl_group_free(SgclGroup* group) {
#ifdef USE_C10D_NCCL
  // Whoever else holds the backend, a reducer for one, has no more use for it.
  if (auto* nccl = dynamic_cast<Nccl*>(group->backend.get())) sgcl::swallowed([&] { nccl->leave(); });
#endif
  sgcl::swallowed([&] { delete group; });
}

}
