// Macros for the sanitizer in use.
#pragma once

#if defined(__has_feature)  // clang
#define POCKETZO_HAS_FEATURE(x) __has_feature(x)
#else
#define POCKETZO_HAS_FEATURE(x) 0
#endif
#if defined(__SANITIZE_THREAD__) || POCKETZO_HAS_FEATURE(thread_sanitizer)
#define POCKETZO_TSAN
#endif
#if defined(__SANITIZE_ADDRESS__) || POCKETZO_HAS_FEATURE(address_sanitizer)
#define POCKETZO_ASAN
#endif
