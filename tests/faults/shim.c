/* Stands before the C library. Counts the calls that touch given directories, and at one of them fails, does half of it,
   or kills the process. Writes down what changes such a directory, in the order in which it was done. Makes a process do
   the same each time it runs: its random numbers, its clock and its id. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { NOTHING, FAIL, HALF, KILL_BEFORE, KILL_AFTER };
#define LOGGED 8192

static char folders[2048], calls[512];
static long at, count;
static int code, mode, record = -1;
static char names[LOGGED][24];
static char paths[LOGGED][160];
static uint64_t determined, drawn, ticks;

#define REAL(name) static __typeof__(name) *real; if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)

/* What is counted: calls named in ",open,fsync,", on paths in "dir:dir:". Counting begins anew. ``place``: the call that is
   spoiled, 0 for none, -1 for each. */
void shim_arm(const char *where, const char *what, long place, int error, int how) {
    snprintf(folders, sizeof folders, "%s", where);
    snprintf(calls, sizeof calls, "%s", what);
    __atomic_store_n(&count, 0, __ATOMIC_SEQ_CST);
    at = place, code = error, mode = how;
}
long shim_count(void) { return __atomic_load_n(&count, __ATOMIC_SEQ_CST); }
const char *shim_name(long place) { return names[(place - 1) % LOGGED]; }
const char *shim_path(long place) { return paths[(place - 1) % LOGGED]; }

/* From now on the clock stands at this second, and moves by a microsecond when it is looked at; 0 ends that. */
void shim_determine(long second) { determined = second, drawn = ticks = 0; }

static void die(void) {
    kill(syscall(SYS_getpid), SIGKILL);
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

/* The path that a call means, and whether it is in a directory that counts. */
static int found_inside(char found[4096], int descriptor, const char *path) {
    char link[64];
    int saved = errno;
    if (!*folders) return 0;
    if (path && (*path == '/' || descriptor == AT_FDCWD)) {
        snprintf(found, 4096, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t size = readlink(link, found, 4095);
        found[size > 0 ? size : 0] = 0;
        if (path && size > 0) snprintf(found + size, 4096 - size, "/%s", path);
    }
    errno = saved;
    return inside(found);
}

/* Whether this call is the one; it is counted if it is of a kind and at a place that count. */
static int meets(const char *name, int descriptor, const char *path) {
    char found[4096], wanted[32];
    if (!found_inside(found, descriptor, path)) return 0;
    snprintf(wanted, sizeof wanted, ",%s,", name);
    if (!strstr(calls, wanted)) return 0;
    long place = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    snprintf(names[(place - 1) % LOGGED], sizeof names[0], "%s", name);
    size_t length = strlen(found);
    size_t skip = length < sizeof paths[0] ? 0 : length - sizeof paths[0] + 1;
    snprintf(paths[(place - 1) % LOGGED], sizeof paths[0], "%s", found + skip);
    if (place != at && at >= 0) return 0;
    if (mode == KILL_BEFORE) die();
    return 1;
}

/* One entry of the record: what was done, to which inode or path, from which byte on, and the second path or the data. */
struct entry { uint32_t kind, path, data, unused; uint64_t inode, offset; };

static void note(char kind, const char *path, uint64_t inode, uint64_t offset, const void *data, size_t size) {
    struct entry entry = {kind, path ? strlen(path) : 0, size, 0, inode, offset};
    struct iovec parts[] = {{&entry, sizeof entry}, {(void *)path, entry.path}, {(void *)data, size}};
    int saved = errno;
    if (syscall(SYS_writev, record, parts, 3) != (ssize_t)(sizeof entry + entry.path + size)) die();
    errno = saved;
}

/* What is done in the directories is written down in a file, -1 for no more. */
void shim_record(int descriptor) { record = descriptor; }
void shim_mark(const char *said) { if (record >= 0) note('m', said, 0, 0, 0, 0); }

static int recorded(int descriptor) {
    char found[4096];
    return record >= 0 && found_inside(found, descriptor, 0);
}
static uint64_t inode_of(int descriptor) {
    struct stat status = {0};
    syscall(SYS_fstat, descriptor, &status);
    return status.st_ino;
}
static void note_file(char kind, int descriptor, uint64_t offset, const void *data, ssize_t size) {
    if (size >= 0 && recorded(descriptor)) note(kind, 0, inode_of(descriptor), offset, data, size);
}
static void note_sync(int descriptor, int result) {
    char found[4096];
    if (!result && record >= 0 && found_inside(found, descriptor, 0)) note('s', found, inode_of(descriptor), 0, 0, 0);
}
static void note_path(char kind, int result, int descriptor, const char *path, int other, const char *second) {
    char one[4096], two[4096] = "";
    if (result < 0 || record < 0 || !found_inside(one, descriptor, path)) return;
    if (second) found_inside(two, other, second);
    struct stat status = {0};
    syscall(SYS_newfstatat, AT_FDCWD, one, &status, AT_SYMLINK_NOFOLLOW);
    note(kind, one, status.st_ino, 0, two, strlen(two));
}
/* Where the next write goes. */
static uint64_t position(int descriptor) {
    if (record < 0) return 0;
    int append = fcntl(descriptor, F_GETFL) & O_APPEND;
    return lseek(descriptor, 0, append ? SEEK_END : SEEK_CUR);
}
/* What the record has no word for: whoever reads it must know that there was more. The index of a log in SQLite is
   mapped, and is nothing that has to outlive the power. */
static void note_unknown(const char *name, int descriptor) {
    char found[4096];
    if (record < 0 || !found_inside(found, descriptor, 0)) return;
    if (strlen(found) < 4 || strcmp(found + strlen(found) - 4, "-shm")) note('?', name, 0, 0, 0, 0);
}

#define DIES if (met && mode == KILL_AFTER) die()
#define DONE(call) do { __typeof__(call) done = (call); DIES; return done; } while (0)
#define FAILS if (met && mode == FAIL) { errno = code; return -1; }
#define PART(size) (met && mode == HALF ? ((size) + 1) / 2 : (size))

static int is_new(int folder, const char *path, int flags) {
    struct stat status;
    return record >= 0 && flags & O_CREAT && syscall(SYS_newfstatat, folder, path, &status, AT_SYMLINK_NOFOLLOW) < 0;
}
static int opened(int done, int new, int folder, const char *path, int flags) {
    int saved = errno;
    if (new) note_path('o', done, folder, path, 0, 0);
    else if (flags & O_TRUNC && done >= 0) note_file('t', done, 0, 0, 0);
    errno = saved;
    return done;
}
#define RANDOM(path) (determined && !strcmp(path, "/dev/urandom") ? "/dev/zero" : path)
#define OPENS(symbol) int symbol(const char *path, int flags, ...) { \
    REAL(symbol); va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    int met = meets("open", AT_FDCWD, path); FAILS int new = is_new(AT_FDCWD, path, flags); \
    DONE(opened(real(RANDOM(path), flags, bits), new, AT_FDCWD, path, flags)); }
#define OPENS_AT(symbol) int symbol(int folder, const char *path, int flags, ...) { \
    REAL(symbol); va_list rest; va_start(rest, flags); mode_t bits = va_arg(rest, mode_t); va_end(rest); \
    int met = meets("open", folder, path); FAILS int new = is_new(folder, path, flags); \
    DONE(opened(real(folder, path, flags, bits), new, folder, path, flags)); }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t read(int fd, void *to, size_t size) {
    REAL(read); int met = meets("read", fd, 0); FAILS DONE(real(fd, to, PART(size)));
}
ssize_t write(int fd, const void *from, size_t size) {
    REAL(write); int met = meets("write", fd, 0); FAILS
    uint64_t offset = position(fd);
    ssize_t done = real(fd, from, PART(size));
    note_file('w', fd, offset, from, done);
    DIES;
    return done;
}
ssize_t pread64(int fd, void *to, size_t size, off64_t where) {
    REAL(pread64); int met = meets("pread", fd, 0); FAILS DONE(real(fd, to, PART(size), where));
}
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t where) {
    REAL(pwrite64); int met = meets("pwrite", fd, 0); FAILS
    ssize_t done = real(fd, from, PART(size), where);
    note_file('w', fd, where, from, done);
    DIES;
    return done;
}
ssize_t writev(int fd, const struct iovec *from, int parts) {
    REAL(writev); int met = meets("writev", fd, 0); FAILS
    note_unknown("writev", fd);
    struct iovec one = {from[0].iov_base, PART(from[0].iov_len)};
    if (met && mode == HALF) return real(fd, &one, 1);
    DONE(real(fd, from, parts));
}
ssize_t preadv64(int fd, const struct iovec *to, int parts, off64_t where) {
    REAL(preadv64); int met = meets("preadv", fd, 0); FAILS
    struct iovec one = {to[0].iov_base, PART(to[0].iov_len)};
    if (met && mode == HALF && parts == 1) return real(fd, &one, 1, where);
    DONE(real(fd, to, parts, where));
}
ssize_t copy_file_range(int from, off64_t *here, int to, off64_t *there, size_t size, unsigned flags) {
    REAL(copy_file_range); int met = meets("copy_file_range", to, 0); FAILS
    note_unknown("copy_file_range", to);
    DONE(real(from, here, to, there, PART(size), flags));
}
ssize_t sendfile64(int to, int from, off64_t *where, size_t size) {
    REAL(sendfile64); int met = meets("sendfile", to, 0); FAILS
    note_unknown("sendfile", to);
    DONE(real(to, from, where, PART(size)));
}
int fsync(int fd) {
    REAL(fsync); int met = meets("fsync", fd, 0); FAILS
    int done = real(fd);
    note_sync(fd, done);
    DIES;
    return done;
}
int fdatasync(int fd) {
    REAL(fdatasync); int met = meets("fdatasync", fd, 0); FAILS
    int done = real(fd);
    note_sync(fd, done);
    DIES;
    return done;
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64); int met = meets("ftruncate", fd, 0); FAILS
    int done = real(fd, size);
    note_file('t', fd, size, 0, done);
    DIES;
    return done;
}
int fchmod(int fd, mode_t bits) { REAL(fchmod); int met = meets("fchmod", fd, 0); FAILS DONE(real(fd, bits)); }

#define PATH(symbol, called, kind, parameters, given, folder, path, other, second) int symbol parameters { \
    REAL(symbol); int met = meets(called, folder, path); FAILS \
    int done = real given; note_path(kind, done, folder, path, other, second); DIES; return done; }
PATH(mkdir, "mkdir", 'd', (const char *path, mode_t bits), (path, bits), AT_FDCWD, path, 0, 0)
PATH(rmdir, "rmdir", 'u', (const char *path), (path), AT_FDCWD, path, 0, 0)
PATH(unlink, "unlink", 'u', (const char *path), (path), AT_FDCWD, path, 0, 0)
PATH(unlinkat, "unlink", 'u', (int folder, const char *path, int flags), (folder, path, flags), folder, path, 0, 0)
/* Known by where it goes to: that is counted, and the place that it came from is the second path. */
PATH(rename, "rename", 'r', (const char *from, const char *to), (from, to), AT_FDCWD, to, AT_FDCWD, from)
PATH(link, "link", 'l', (const char *from, const char *to), (from, to), AT_FDCWD, to, AT_FDCWD, from)

/* Looking about changes nothing, but a disk can refuse it. */
#define LOOKS(symbol, folder, path, parameters, given) int symbol parameters { \
    REAL(symbol); int met = meets("stat", folder, path); FAILS DONE(real given); }
LOOKS(stat64, AT_FDCWD, path, (const char *path, struct stat64 *to), (path, to))
LOOKS(lstat64, AT_FDCWD, path, (const char *path, struct stat64 *to), (path, to))
LOOKS(fstat64, fd, 0, (int fd, struct stat64 *to), (fd, to))
LOOKS(access, AT_FDCWD, path, (const char *path, int how), (path, how))
DIR *opendir(const char *path) {
    REAL(opendir); int met = meets("opendir", AT_FDCWD, path);
    if (met && mode == FAIL) { errno = code; return 0; }
    DONE(real(path));
}
void *mmap64(void *where, size_t size, int bits, int flags, int fd, off64_t offset) {
    REAL(mmap64); int met = fd >= 0 && meets("mmap", fd, 0);
    if (met && mode == FAIL) { errno = code; return MAP_FAILED; }
    if (fd >= 0 && flags & MAP_SHARED && bits & PROT_WRITE) note_unknown("mmap", fd);
    DONE(real(where, size, bits, flags, fd, offset));
}

/* The same each time, for each fork of a process. */
ssize_t getrandom(void *to, size_t size, unsigned flags) {
    REAL(getrandom);
    if (!determined) return real(to, size, flags);
    for (size_t i = 0; i < size; i++) {
        drawn = drawn * 6364136223846793005u + 1442695040888963407u;
        ((unsigned char *)to)[i] = drawn >> 56;
    }
    return size;
}
int clock_gettime(clockid_t clock, struct timespec *to) {
    REAL(clock_gettime);
    if (!determined || clock != CLOCK_REALTIME) return real(clock, to);
    *to = (struct timespec){determined, ++ticks * 1000};
    return 0;
}
pid_t getpid(void) { return determined ? 2 : syscall(SYS_getpid); }
