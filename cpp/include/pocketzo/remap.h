// Replaces a file mapping, which another library made and goes on using, by anonymous memory.
#pragma once

#include <cstddef>

namespace pocketzo {

// Replaces the pages of a private mapping, from the page-aligned `address` on, by zeroed memory: in huge pages if the
// system has them. Addresses stay valid; the owner of the mapping still unmaps them. Returns 0 or an errno value:
// EINVAL if `address` is not page-aligned or `bytes` is 0, ENOSYS if the system has no such call.
int remap(void* address, std::size_t bytes) noexcept;

}  // namespace pocketzo
