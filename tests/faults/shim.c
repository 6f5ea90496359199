/* Stands before the C library: counts the calls that touch given directories, and at one of them fails, does half
   of it, or kills the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NOTHING, FAIL, HALF, KILL_BEFORE, KILL_AFTER };
#define LOGGED 8192

static char folders[2048], calls[512];
static long at, count;
static int code, mode;
static char names[LOGGED][24];
static char paths[LOGGED][160];

/* What is counted: calls named in ",open,fsync,", on paths in "dir:dir:". Counting begins anew. */
void shim_arm(const char *where, const char *what, long place, int error, int how) {
    snprintf(folders, sizeof folders, "%s", where);
    snprintf(calls, sizeof calls, "%s", what);
    __atomic_store_n(&count, 0, __ATOMIC_SEQ_CST);
    at = place, code = error, mode = how;
}
long shim_count(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }
const char *shim_name(long place) { return names[(place - 1) % LOGGED]; }
const char *shim_path(long place) { return paths[(place - 1) % LOGGED]; }

static void die(void) {
    kill(getpid(), SIGKILL);
    pause();
}

static int inside(const char *path) {
    for (const char *from = folders; *from;) {
        const char *end = strchr(from, ':');
        size_t size = end ? (size_t)(end - from) : strlen(from);
        if (size && !strncmp(path, from, size)) return 1;
        if (!end) break;
        from = end + 1;
    }
    return 0;
}

/* Whether this call is the one; it is counted if it is of a kind and at a place that count. */
static int meets(const char *name, int descriptor, const char *path) {
    char found[4096], link[64], wanted[32];
    int saved = errno;
    if (!*folders) return 0;
    snprintf(wanted, sizeof wanted, ",%s,", name);
    if (!strstr(calls, wanted)) return 0;
    if (path && (*path == '/' || descriptor == AT_FDCWD)) {
        snprintf(found, sizeof found, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t size = readlink(link, found, sizeof found - 1);
        found[size > 0 ? size : 0] = 0;
        if (path && size > 0) snprintf(found + size, sizeof found - size, "/%s", path);
    }
    errno = saved;
    if (!inside(found)) return 0;
    long place = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    snprintf(names[(place - 1) % LOGGED], sizeof names[0], "%s", name);
    size_t length = strlen(found);
    size_t skip = length < sizeof paths[0] ? 0 : length - sizeof paths[0] + 1;
    snprintf(paths[(place - 1) % LOGGED], sizeof paths[0], "%s", found + skip);
    if (place != at) return 0;
    if (mode == KILL_BEFORE) die();
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)
#define DONE(call) do { __typeof__(call) done = (call); \
    if (met && mode == KILL_AFTER) { die(); } return done; } while (0)
#define FAILS if (met && mode == FAIL) { errno = code; return -1; }
#define PART(size) (met && mode == HALF ? ((size) + 1) / 2 : (size))

#define OPENS(symbol) int symbol(const char *path, int flags, ...) { \
    REAL(symbol); va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    int met = meets("open", AT_FDCWD, path); FAILS DONE(real(path, flags, bits)); }
#define OPENS_AT(symbol) int symbol(int folder, const char *path, int flags, ...) { \
    REAL(symbol); va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    int met = meets("open", folder, path); FAILS DONE(real(folder, path, flags, bits)); }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t read(int fd, void *to, size_t size) {
    REAL(read); int met = meets("read", fd, 0); FAILS DONE(real(fd, to, PART(size)));
}
ssize_t write(int fd, const void *from, size_t size) {
    REAL(write); int met = meets("write", fd, 0); FAILS DONE(real(fd, from, PART(size)));
}
ssize_t pread64(int fd, void *to, size_t size, off64_t where) {
    REAL(pread64); int met = meets("pread", fd, 0); FAILS DONE(real(fd, to, PART(size), where));
}
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t where) {
    REAL(pwrite64); int met = meets("pwrite", fd, 0); FAILS DONE(real(fd, from, PART(size), where));
}
ssize_t preadv64(int fd, const struct iovec *to, int parts, off64_t where) {
    REAL(preadv64); int met = meets("preadv", fd, 0); FAILS
    struct iovec one = {to[0].iov_base, PART(to[0].iov_len)};
    if (met && mode == HALF && parts == 1) return real(fd, &one, 1, where);
    DONE(real(fd, to, parts, where));
}
ssize_t copy_file_range(int from, off64_t *here, int to, off64_t *there, size_t size, unsigned flags) {
    REAL(copy_file_range); int met = meets("copy_file_range", to, 0); FAILS
    DONE(real(from, here, to, there, PART(size), flags));
}
ssize_t sendfile64(int to, int from, off64_t *where, size_t size) {
    REAL(sendfile64); int met = meets("sendfile", to, 0); FAILS DONE(real(to, from, where, PART(size)));
}
int fsync(int fd) { REAL(fsync); int met = meets("fsync", fd, 0); FAILS DONE(real(fd)); }
int fdatasync(int fd) { REAL(fdatasync); int met = meets("fdatasync", fd, 0); FAILS DONE(real(fd)); }
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64); int met = meets("ftruncate", fd, 0); FAILS DONE(real(fd, size));
}
int rename(const char *from, const char *to) {
    REAL(rename); int met = meets("rename", AT_FDCWD, to); FAILS DONE(real(from, to));
}
int mkdir(const char *path, mode_t bits) {
    REAL(mkdir); int met = meets("mkdir", AT_FDCWD, path); FAILS DONE(real(path, bits));
}
int rmdir(const char *path) { REAL(rmdir); int met = meets("rmdir", AT_FDCWD, path); FAILS DONE(real(path)); }
int unlink(const char *path) { REAL(unlink); int met = meets("unlink", AT_FDCWD, path); FAILS DONE(real(path)); }
int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat); int met = meets("unlink", folder, path); FAILS DONE(real(folder, path, flags));
}
void *mmap64(void *where, size_t size, int bits, int flags, int fd, off64_t offset) {
    REAL(mmap64); int met = fd >= 0 && meets("mmap", fd, 0);
    if (met && mode == FAIL) { errno = code; return MAP_FAILED; }
    DONE(real(where, size, bits, flags, fd, offset));
}
