#include <algorithm>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "guard.h"
#include "types.h"

using sgcl::guarded;
using std::chrono::milliseconds;

namespace {

c10::intrusive_ptr<c10d::TCPStore> tcp(const char* host, uint16_t port, int64_t timeout_ms, bool server) {
  c10d::TCPStoreOptions options;
  options.port = port;
  options.isServer = server;
  options.waitWorkers = false;
  options.timeout = milliseconds(timeout_ms);
  return c10::make_intrusive<c10d::TCPStore>(std::string(host), options);
}

}  // namespace

extern "C" {

void sgcl_string_free(char* text) { std::free(text); }
void sgcl_bytes_free(uint8_t* data) { std::free(data); }

int32_t sgcl_store_listen(const char* host, uint16_t port, int64_t timeout_ms, SgclStore** out, uint16_t* bound, char** message) {
  return guarded(message, [&] {
    auto store = tcp(host, port, timeout_ms, true);
    *bound = store->getPort();
    *out = new SgclStore{store};
  });
}

int32_t sgcl_store_connect(const char* host, uint16_t port, int64_t timeout_ms, SgclStore** out, char** message) {
  return guarded(message, [&] { *out = new SgclStore{tcp(host, port, timeout_ms, false)}; });
}

int32_t sgcl_store_prefix(SgclStore* store, const char* prefix, SgclStore** out, char** message) {
  return guarded(message, [&] { *out = new SgclStore{c10::make_intrusive<c10d::PrefixStore>(std::string(prefix), store->store)}; });
}

int32_t sgcl_store_set(SgclStore* store, const char* key, const uint8_t* data, size_t length, char** message) {
  return guarded(message, [&] { store->store->set(key, std::vector<uint8_t>(data, data + length)); });
}

int32_t sgcl_store_get(SgclStore* store, const char* key, uint8_t** data, size_t* length, char** message) {
  return guarded(message, [&] {
    const auto value = store->store->get(key);
    *data = static_cast<uint8_t*>(std::malloc(std::max<size_t>(value.size(), 1)));
    TORCH_CHECK(*data != nullptr, "out of memory");
    std::copy(value.begin(), value.end(), *data);
    *length = value.size();
  });
}

int32_t sgcl_store_wait(SgclStore* store, const char* key, int64_t timeout_ms, char** message) {
  return guarded(message, [&] { store->store->wait({key}, milliseconds(timeout_ms)); });
}

int32_t sgcl_store_add(SgclStore* store, const char* key, int64_t amount, int64_t* sum, char** message) {
  return guarded(message, [&] { *sum = store->store->add(key, amount); });
}

void sgcl_store_free(SgclStore* store) {
  sgcl::swallowed([&] { delete store; });
}

}
