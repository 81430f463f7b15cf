/* Stands between a process and the C library (LD_PRELOAD): records what the process asks of the file system below one
 * folder, kills the process at a chosen request, lets the disk be full after a chosen number of bytes, or refuses to
 * exchange names, as some file systems do.
 *
 * A request is one line of tab-separated fields in the log, written before the request is made:
 *
 *   open    fd flags path    (after it, as it returns fd)
 *   write   fd offset bytes in hexadecimal
 *   cut     fd size
 *   sync    fd
 *   rename  from to
 *   swap    a b
 *   mkdir   path
 *   unlink  path
 *   rmdir   path
 *   said    bytes in hexadecimal, of standard output
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int log_file = -1;
static long requests, kill_at;
static double written_of_killed;
static long room = -1;
static int full_error;
static int can_swap = 1;
static char ours[FILES];

/* Begins; kill_request counts from 1 and is 0 for never, bytes_of_room is -1 for no limit. */
void faults_begin(const char *folder, int log, long kill_request, double part, long bytes_of_room, int error,
                  int swaps) {
  snprintf(root, sizeof root, "%s/", folder);
  root_length = strlen(root);
  log_file = log;
  kill_at = kill_request;
  written_of_killed = part;
  room = bytes_of_room;
  full_error = error;
  can_swap = swaps;
}

static void say(const char *format, ...) {
  char line[3 * PATH_MAX];
  va_list arguments;
  va_start(arguments, format);
  int length = vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (log_file >= 0 && syscall(SYS_write, log_file, line, length) != length) abort();
}

static void say_bytes(const char *prefix, const void *data, size_t size) {
  if (log_file < 0) return;
  size_t begin = strlen(prefix);
  char *line = malloc(begin + 2 * size + 2);
  memcpy(line, prefix, begin);
  for (size_t i = 0; i < size; i++) sprintf(line + begin + 2 * i, "%02x", ((const unsigned char *)data)[i]);
  line[begin + 2 * size] = '\n';
  size_t length = begin + 2 * size + 1, done = 0;
  while (done < length) {
    ssize_t n = syscall(SYS_write, log_file, line + done, length - done);
    if (n <= 0) abort();
    done += n;
  }
  free(line);
}

/* Writes the absolute path into full; returns whether it is the root or below it. */
static int below(int folder, const char *path, char full[PATH_MAX]) {
  if (!root_length || !path) return 0;
  if (path[0] == '/') {
    snprintf(full, PATH_MAX, "%s", path);
  } else {
    char link[64], base[PATH_MAX];
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
    if (snprintf(full, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
  }
  return !strncmp(full, root, root_length) || (!strncmp(full, root, root_length - 1) && !full[root_length - 1]);
}

static int is_ours(int fd) { return root_length && fd >= 0 && fd < FILES && ours[fd]; }

/* Counts a request; whether the process has to die at it. */
static int is_last(void) { return ++requests == kill_at; }

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

static void count(void) {
  if (is_last()) die();
}

#define LOCKED(statement) do { pthread_mutex_lock(&lock); statement; pthread_mutex_unlock(&lock); } while (0)

static int open_file(int folder, const char *path, int flags, mode_t mode) {
  char full[PATH_MAX];
  int inside = below(folder, path, full);
  if (!inside) return (int)syscall(SYS_openat, folder, path, flags, mode);
  pthread_mutex_lock(&lock);
  if (flags & (O_CREAT | O_TRUNC)) count();
  int fd = (int)syscall(SYS_openat, folder, path, flags, mode), error = errno;
  if (fd >= 0 && fd < FILES) {
    ours[fd] = 1;
    say("open\t%d\t%d\t%s\n", fd, flags, full);
  }
  pthread_mutex_unlock(&lock);
  errno = error;
  return fd;
}

#define OPEN(name)                                        \
  int name(const char *path, int flags, ...) {            \
    va_list arguments;                                    \
    va_start(arguments, flags);                           \
    mode_t mode = va_arg(arguments, int);                 \
    va_end(arguments);                                    \
    return open_file(AT_FDCWD, path, flags, mode);        \
  }
#define OPENAT(name)                                      \
  int name(int folder, const char *path, int flags, ...) {\
    va_list arguments;                                    \
    va_start(arguments, flags);                           \
    mode_t mode = va_arg(arguments, int);                 \
    va_end(arguments);                                    \
    return open_file(folder, path, flags, mode);          \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
  if (fd >= 0 && fd < FILES) ours[fd] = 0;
  return (int)syscall(SYS_close, fd);
}

/* offset -1: where the file is. */
static ssize_t put(int fd, const void *data, size_t size, off_t offset) {
  char prefix[64];
  if (root_length && fd == 1) LOCKED(say_bytes("said\t", data, size));
  if (!is_ours(fd)) return offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
  pthread_mutex_lock(&lock);
  int last = is_last();
  if (last) size *= written_of_killed;
  if (room >= 0 && (long)size > room) size = room;
  off_t at = offset;
  struct stat now;
  if (at < 0) at = fcntl(fd, F_GETFL) & O_APPEND && !fstat(fd, &now) ? now.st_size : lseek(fd, 0, SEEK_CUR);
  ssize_t done = -1;
  errno = full_error;
  if (size || room != 0) {
    snprintf(prefix, sizeof prefix, "write\t%d\t%ld\t", fd, (long)at);
    say_bytes(prefix, data, size);
    done = offset < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, offset);
    if (room >= 0 && done > 0) room -= done;
  }
  int error = errno;
  if (last) die();
  pthread_mutex_unlock(&lock);
  errno = error;
  return done;
}

ssize_t write(int fd, const void *data, size_t size) { return put(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return put(fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) { return put(fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int number) {
  if (!is_ours(fd)) return syscall(SYS_writev, fd, parts, number);
  return number ? put(fd, parts[0].iov_base, parts[0].iov_len, -1) : 0;
}

/* These copy in the kernel; the caller falls back to reads and writes. */
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
  if (is_ours(to)) return errno = EINVAL, -1;
  return syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) { return sendfile(to, from, offset, size); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
  if (is_ours(to)) return errno = EXDEV, -1;
  return syscall(SYS_copy_file_range, from, a, to, b, size, flags);
}

static int cut(int fd, off_t size) {
  if (is_ours(fd)) LOCKED(count(); say("cut\t%d\t%ld\n", fd, (long)size));
  return (int)syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return cut(fd, size); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size); }

static int sync_file(long request, int fd) {
  if (is_ours(fd)) LOCKED(count());
  int result = (int)syscall(request, fd);
  if (!result && is_ours(fd)) LOCKED(say("sync\t%d\n", fd));
  return result;
}
int fsync(int fd) { return sync_file(SYS_fsync, fd); }
int fdatasync(int fd) { return sync_file(SYS_fdatasync, fd); }

/* Makes a request on one or two paths, and records it if it succeeds. */
static int change(const char *what, int folder, const char *a, int other, const char *b, long request, int flags,
                  mode_t mode) {
  char first[PATH_MAX], second[PATH_MAX] = "";
  int inside = below(folder, a, first);
  if (b) inside |= below(other, b, second);
  if (inside) {
    pthread_mutex_lock(&lock);
    count();
  }
  int result;
  if (b) result = (int)syscall(SYS_renameat2, folder, a, other, b, flags);
  else if (request == SYS_mkdirat) result = (int)syscall(SYS_mkdirat, folder, a, mode);
  else result = (int)syscall(SYS_unlinkat, folder, a, flags);
  int error = errno;
  if (inside) {
    if (!result) say(b ? "%s\t%s\t%s\n" : "%s\t%s\n", what, first, second);
    pthread_mutex_unlock(&lock);
  }
  errno = error;
  return result;
}

int renameat2(int folder, const char *a, int other, const char *b, unsigned flags) {
  if (flags & 2 && !can_swap) return errno = EINVAL, -1;
  return change(flags & 2 ? "swap" : "rename", folder, a, other, b, SYS_renameat2, flags, 0);
}
int renameat(int folder, const char *a, int other, const char *b) { return renameat2(folder, a, other, b, 0); }
int rename(const char *a, const char *b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, 0); }
int mkdirat(int folder, const char *path, mode_t mode) {
  return change("mkdir", folder, path, 0, NULL, SYS_mkdirat, 0, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int folder, const char *path, int flags) {
  return change(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, 0, NULL, SYS_unlinkat, flags, 0);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
