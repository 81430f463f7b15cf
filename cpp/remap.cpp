#include "pocketzo/remap.h"

#include <cerrno>
#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pocketzo {

int remap([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(__linux__)
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (bytes == 0 || reinterpret_cast<std::uintptr_t>(address) % page != 0) return EINVAL;
  const std::size_t length = (bytes + page - 1) / page * page;
  if (mmap(address, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != address)
    return errno;
#if defined(MADV_HUGEPAGE)
  madvise(address, length, MADV_HUGEPAGE);  // a failure leaves small pages
#endif
  return 0;
#else
  return ENOSYS;
#endif
}

}  // namespace pocketzo
