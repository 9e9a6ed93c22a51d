// Turns C++ exceptions into a status and a message.
#pragma once

#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/exception.h>

#include "shim.h"

namespace sgcl {

inline int32_t report(int32_t status, const std::string& what, char** message) {
  // The first line says what happened; libtorch puts stack traces below it.
  const std::string line = what.substr(0, what.find('\n'));
  *message = static_cast<char*>(std::malloc(line.size() + 1));
  if (*message != nullptr) std::memcpy(*message, line.c_str(), line.size() + 1);
  return status;
}

// Gloo's exceptions reach us as plain std::exception (its headers and libtorch's copy may differ), so kinds are told by text.
inline int32_t kind(const std::string& what, int32_t otherwise) {
  for (const char* sign : {"imed out", "imeout", "TIMEOUT"}) {
    if (what.find(sign) != std::string::npos) return SGCL_TIMEOUT;
  }
  for (const char* sign : {"gloo/transport", "onnection closed", "onnection reset", "onnection refused", "Broken pipe", "NCCL error",
                           "NCCL communicator"}) {
    if (what.find(sign) != std::string::npos) return SGCL_BROKEN;
  }
  return otherwise;
}

template <typename Call>
int32_t guarded(char** message, Call&& call) noexcept {
  try {
    call();
    return SGCL_OK;
  } catch (const c10d::TimeoutError& e) {
    return report(SGCL_TIMEOUT, e.what_without_backtrace(), message);
  } catch (const c10::DistStoreError& e) {
    return report(kind(e.what_without_backtrace(), SGCL_STORE), e.what_without_backtrace(), message);
  } catch (const c10::DistNetworkError& e) {
    return report(kind(e.what_without_backtrace(), SGCL_STORE), e.what_without_backtrace(), message);
  } catch (const c10::DistBackendError& e) {
    return report(kind(e.what_without_backtrace(), SGCL_BROKEN), e.what_without_backtrace(), message);
  } catch (const c10::Error& e) {
    return report(kind(e.what_without_backtrace(), SGCL_REFUSED), e.what_without_backtrace(), message);
  } catch (const std::exception& e) {
    return report(kind(e.what(), SGCL_REFUSED), e.what(), message);
  } catch (...) {
    return report(SGCL_REFUSED, "an exception that is no std::exception", message);
  }
}

// For destructors: what they throw has nobody left to read it.
template <typename Call>
void swallowed(Call&& call) noexcept {
  try {
    call();
  } catch (...) {
  }
}

}  // namespace sgcl
