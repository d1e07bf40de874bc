// Preloaded before libc: counts a process's file operations below one folder and, at the n-th, fails it, tears it or
// kills the process. Built by tests/support/crash_lab.py:  cc -shared -fPIC -O1 -o faults.so faults.c
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASS, KILL_BEFORE, KILL_AFTER, FAIL, TEAR, TEAR_AND_KILL };

struct shared {  // memory that the forking parent still reads when the child is dead
  atomic_long done;
  char last[248];  // the last operation that began
};

static struct shared *state;
static char root[1024];
static long at;
static int mode, error;

void faults_arm(struct shared *memory, const char *folder, long nth, int what, int number) {
  snprintf(root, sizeof root, "%s", folder);
  at = nth, mode = what, error = number;
  atomic_store(&memory->done, 0);
  state = memory;
}

static void die(void) { kill(getpid(), SIGKILL); }

// What is to happen to this operation. The n-th counts from 1.
static int verdict(const char *name, const char *path) {
  if (!state || !path || strncmp(path, root, strlen(root))) return PASS;
  snprintf(state->last, sizeof state->last, "%s %s", name, path + strlen(root));
  if (atomic_fetch_add(&state->done, 1) + 1 != at) return PASS;
  if (mode == KILL_BEFORE) die();
  return mode;
}

static const char *path_of(int fd, char *buffer, size_t size) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = state ? readlink(link, buffer, size - 1) : -1;
  if (length < 0) return NULL;
  buffer[length] = 0;
  return buffer;
}

static const char *path_at(int folder, const char *path, char *buffer, size_t size) {
  if (folder == AT_FDCWD || path[0] == '/') return path;
  char base[1024];
  if (!path_of(folder, base, sizeof base)) return NULL;
  snprintf(buffer, size, "%s/%s", base, path);
  return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define RUN(name, path, call)                                     \
  do {                                                            \
    int found = verdict(name, path);                              \
    if (found >= FAIL) {                                          \
      if (found == TEAR_AND_KILL) die();                          \
      errno = found == TEAR ? EIO : error;                        \
      return -1;                                                  \
    }                                                             \
    __typeof__(call) result = call;                               \
    if (found == KILL_AFTER) die();                               \
    return result;                                                \
  } while (0)

static mode_t permissions(int flags, va_list rest) {
  return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                                          \
  int name(const char *path, int flags, ...) {                              \
    va_list rest;                                                           \
    va_start(rest, flags);                                                  \
    mode_t bits = permissions(flags, rest);                                 \
    va_end(rest);                                                           \
    if (!(flags & (O_CREAT | O_WRONLY | O_RDWR))) return REAL(name)(path, flags, bits); \
    RUN("open", path, REAL(name)(path, flags, bits));                       \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                        \
  int name(int folder, const char *path, int flags, ...) {                  \
    va_list rest;                                                           \
    va_start(rest, flags);                                                  \
    mode_t bits = permissions(flags, rest);                                 \
    va_end(rest);                                                           \
    if (!(flags & (O_CREAT | O_WRONLY | O_RDWR))) return REAL(name)(folder, path, flags, bits); \
    char full[2048];                                                        \
    RUN("open", path_at(folder, path, full, sizeof full), REAL(name)(folder, path, flags, bits)); \
  }
OPENAT(openat)
OPENAT(openat64)

// A torn write leaves the first half of the bytes.
#define WRITE(name, arguments, half, call)                        \
  ssize_t name arguments {                                        \
    char full[1024];                                              \
    int found = verdict("write", path_of(fd, full, sizeof full)); \
    if (found == TEAR || found == TEAR_AND_KILL) {                \
      half;                                                       \
      if (found == TEAR_AND_KILL) die();                          \
      errno = EIO;                                                \
      return -1;                                                  \
    }                                                             \
    if (found == FAIL) {                                          \
      errno = error;                                              \
      return -1;                                                  \
    }                                                             \
    ssize_t result = call;                                        \
    if (found == KILL_AFTER) die();                               \
    return result;                                                \
  }
WRITE(write, (int fd, const void *data, size_t size), (void)!REAL(write)(fd, data, size / 2), REAL(write)(fd, data, size))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t place), (void)!REAL(pwrite64)(fd, data, size / 2, place),
      REAL(pwrite64)(fd, data, size, place))
WRITE(writev, (int fd, const struct iovec *parts, int count), (void)!REAL(writev)(fd, parts, count / 2),
      REAL(writev)(fd, parts, count))

int rename(const char *from, const char *to) { RUN("rename", to, REAL(rename)(from, to)); }
int link(const char *from, const char *to) { RUN("link", to, REAL(link)(from, to)); }
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
  char full[2048];
  RUN("link", path_at(to_folder, to, full, sizeof full), REAL(linkat)(from_folder, from, to_folder, to, flags));
}
int unlink(const char *path) { RUN("unlink", path, REAL(unlink)(path)); }
int mkdir(const char *path, mode_t bits) { RUN("mkdir", path, REAL(mkdir)(path, bits)); }
int fsync(int fd) {
  char full[1024];
  RUN("fsync", path_of(fd, full, sizeof full), REAL(fsync)(fd));
}
int fdatasync(int fd) {
  char full[1024];
  RUN("fdatasync", path_of(fd, full, sizeof full), REAL(fdatasync)(fd));
}
