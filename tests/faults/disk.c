/* Counts each operation that changes a file below one folder, and makes one of them fail or kill the process.
 *
 * Loaded with LD_PRELOAD, so that it sees what Python, SQLite and safetensors' Rust do alike. It sleeps until
 * `fault_arm` is called. From then on a callback decides for each operation: it happens, the process is killed (a write
 * is half done first), or the call fails with an errno.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* 0: go on; -1: die; an errno: fail with it. */
typedef int (*decider)(const char *call, const char *path);

static char below[4096];
static decider decide;

void fault_arm(const char *folder, decider callback) {
    snprintf(below, sizeof below, "%s", folder);
    decide = callback;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void path_of_descriptor(int descriptor, char *out, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, out, size - 1);
    out[length < 0 ? 0 : length] = 0;
}

static void path_at(int folder, const char *path, char *out, size_t size) {
    if (path[0] == '/') {
        snprintf(out, size, "%s", path);
        return;
    }
    char base[4096];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else
        path_of_descriptor(folder, base, sizeof base);
    snprintf(out, size, "%s/%s", base, path);
}

/* 0: go on; -1: fail with errno; 1: die, after half of a write. */
static int judge(const char *call, const char *path) {
    if (!below[0] || strncmp(path, below, strlen(below))) return 0;
    int decided = decide(call, path);
    if (decided <= 0) return -decided;
    errno = decided;
    return -1;
}

static int judge_at(const char *call, int folder, const char *path) {
    if (!below[0]) return 0;
    char full[8192];
    path_at(folder, path, full, sizeof full);
    return judge(call, full);
}

static int judge_descriptor(const char *call, int descriptor) {
    if (!below[0]) return 0;
    char full[4096];
    path_of_descriptor(descriptor, full, sizeof full);
    return judge(call, full);
}

static void die(void) { kill(getpid(), SIGKILL); }

#define CHECK(verdict)                   \
    do {                                 \
        int decided = (verdict);         \
        if (decided > 0) die();          \
        if (decided < 0) return -1;      \
    } while (0)

#define CHANGES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
#define MODE(flags)                                     \
    mode_t mode = 0;                                    \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {            \
        va_list rest;                                   \
        va_start(rest, flags);                          \
        mode = va_arg(rest, mode_t);                    \
        va_end(rest);                                   \
    }

int open(const char *path, int flags, ...) {
    MODE(flags)
    if (flags & CHANGES) CHECK(judge_at("open", AT_FDCWD, path));
    return REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    if (flags & CHANGES) CHECK(judge_at("open", AT_FDCWD, path));
    return REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags)
    if (flags & CHANGES) CHECK(judge_at("open", folder, path));
    return REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    if (flags & CHANGES) CHECK(judge_at("open", folder, path));
    return REAL(openat64)(folder, path, flags, mode);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    int verdict = judge_descriptor("write", descriptor);
    if (verdict < 0) return -1;
    if (verdict > 0) {
        REAL(write)(descriptor, data, size / 2);
        die();
    }
    return REAL(write)(descriptor, data, size);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t place) {
    int verdict = judge_descriptor("write", descriptor);
    if (verdict < 0) return -1;
    if (verdict > 0) {
        REAL(pwrite)(descriptor, data, size / 2, place);
        die();
    }
    return REAL(pwrite)(descriptor, data, size, place);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t place) {
    int verdict = judge_descriptor("write", descriptor);
    if (verdict < 0) return -1;
    if (verdict > 0) {
        REAL(pwrite64)(descriptor, data, size / 2, place);
        die();
    }
    return REAL(pwrite64)(descriptor, data, size, place);
}
ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    CHECK(judge_descriptor("write", descriptor));
    return REAL(writev)(descriptor, parts, number);
}
ssize_t sendfile(int to, int from, off_t *place, size_t size);
ssize_t sendfile(int to, int from, off_t *place, size_t size) {
    CHECK(judge_descriptor("write", to));
    return REAL(sendfile)(to, from, place, size);
}
ssize_t sendfile64(int to, int from, off64_t *place, size_t size);
ssize_t sendfile64(int to, int from, off64_t *place, size_t size) {
    CHECK(judge_descriptor("write", to));
    return REAL(sendfile64)(to, from, place, size);
}
int fsync(int descriptor) {
    CHECK(judge_descriptor("fsync", descriptor));
    return REAL(fsync)(descriptor);
}
int fdatasync(int descriptor) {
    CHECK(judge_descriptor("fsync", descriptor));
    return REAL(fdatasync)(descriptor);
}
int ftruncate(int descriptor, off_t size) {
    CHECK(judge_descriptor("truncate", descriptor));
    return REAL(ftruncate)(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) {
    CHECK(judge_descriptor("truncate", descriptor));
    return REAL(ftruncate64)(descriptor, size);
}
int rename(const char *from, const char *to) {
    CHECK(judge_at("rename", AT_FDCWD, to));
    return REAL(rename)(from, to);
}
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    CHECK(judge_at("rename", to_folder, to));
    return REAL(renameat)(from_folder, from, to_folder, to);
}
int link(const char *from, const char *to) {
    CHECK(judge_at("link", AT_FDCWD, to));
    return REAL(link)(from, to);
}
int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    CHECK(judge_at("link", to_folder, to));
    return REAL(linkat)(from_folder, from, to_folder, to, flags);
}
int unlink(const char *path) {
    CHECK(judge_at("unlink", AT_FDCWD, path));
    return REAL(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    CHECK(judge_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path));
    return REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    CHECK(judge_at("rmdir", AT_FDCWD, path));
    return REAL(rmdir)(path);
}
int mkdir(const char *path, mode_t mode) {
    CHECK(judge_at("mkdir", AT_FDCWD, path));
    return REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    CHECK(judge_at("mkdir", folder, path));
    return REAL(mkdirat)(folder, path, mode);
}
int chmod(const char *path, mode_t mode) {
    CHECK(judge_at("chmod", AT_FDCWD, path));
    return REAL(chmod)(path, mode);
}
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    CHECK(judge_at("chmod", folder, path));
    return REAL(fchmodat)(folder, path, mode, flags);
}
