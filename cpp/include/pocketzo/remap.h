// Anonymous memory in the place of a file mapping that someone else has made, and goes on using.
#pragma once

#include <cstddef>

namespace pocketzo {

// Replaces the pages of a private mapping from `address` on, which begins a page, by zeroed memory: in huge pages where
// the system has them. Returns 0 or the value of errno; EINVAL where `address` begins no page or `bytes` is 0, ENOSYS
// where the system has no such call.
int remap(void* address, std::size_t bytes) noexcept;

}  // namespace pocketzo
