/* What a program does to the files of one folder: written down, or made to fail. For LD_PRELOAD.
 *
 * shim_trace(folder, file): from now on every write, truncation, synchronisation, creation and removal in `folder` is
 *     appended to `file` as a record: a header (see struct record) and its bytes.
 * shim_fail(folder, call, how, number, lasting): the `number`-th write ('w') or synchronisation ('s') on the database
 *     in `folder` (or its log or journal) fails: 'i' EIO, 'n' ENOSPC, 'h' half of the bytes are written and then
 *     there is no space. If `lasting`, all later ones fail too.
 * shim_calls(call): how many of them were counted since; shim_failed(): how many were made to fail.
 *
 * One thread at a time. Descriptors over 1023 are not looked at.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define MAX_FILES 1024
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

struct record {
    char kind; /* 'c' create, 'w' write, 't' truncate, 's' sync, 'u' unlink, 'd' sync of the folder */
    char name[63];
    int64_t offset; /* of a write; the new length of a truncation */
    int64_t size;   /* of the bytes that follow */
};

static char folder[4096];
static int trace = -1;
static char names[MAX_FILES][63]; /* "" : not ours; "/" : the folder itself */
static char fail_how;
static char fail_call;
static long fail_number, fail_lasting, writes, syncs, failed, half_done;

static void note(char kind, const char *name, int64_t offset, const void *bytes, int64_t size) {
    if (trace < 0)
        return;
    struct record record = {.kind = kind, .offset = offset, .size = size};
    strncpy(record.name, name, sizeof record.name - 1);
    REAL(write)(trace, &record, sizeof record);
    if (size)
        REAL(write)(trace, bytes, size);
}

/* The name of a path in our folder, "/" for the folder itself, or NULL. */
static const char *inside(const char *path) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length))
        return NULL;
    if (!path[length])
        return "/";
    return path[length] == '/' && !strchr(path + length + 1, '/') ? path + length + 1 : NULL;
}

static const char *of(int fd) { return fd >= 0 && fd < MAX_FILES && names[fd][0] ? names[fd] : NULL; }

static int is_database(const char *name) { return !strncmp(name, "prunus.db", 9); }

/* Whether this call has to fail, and how. */
static char verdict(char call, const char *name) {
    if (!name || !is_database(name))
        return 0;
    long number = call == 'w' ? ++writes : ++syncs;
    long last = fail_number + (fail_how == 'h'); /* the rest of what was written by half is asked for at once */
    if (call != fail_call || !fail_how || number < fail_number || (number > last && !fail_lasting))
        return 0;
    failed++;
    return fail_how;
}

void shim_trace(const char *where, const char *file) {
    strncpy(folder, where, sizeof folder - 1);
    trace = REAL(open)(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

void shim_fail(const char *where, char call, char how, long number, long lasting) {
    strncpy(folder, where, sizeof folder - 1);
    fail_call = call, fail_how = how, fail_number = number, fail_lasting = lasting;
    writes = syncs = failed = half_done = 0;
}

long shim_calls(char call) { return call == 'w' ? writes : syncs; }

long shim_failed(void) { return failed; }

static int opened(int fd, const char *path, int flags, int existed) {
    const char *name = inside(path);
    if (fd < 0 || fd >= MAX_FILES)
        return fd;
    names[fd][0] = 0;
    if (name) {
        strncpy(names[fd], name, sizeof names[fd] - 1);
        if ((flags & O_CREAT) && !existed)
            note('c', name, 0, NULL, 0);
        if (flags & O_TRUNC)
            note('t', name, 0, NULL, 0);
    }
    return fd;
}

#define OPEN(function)                                                                                                 \
    int function(const char *path, int flags, ...) {                                                                   \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        int existed = inside(path) && !access(path, F_OK);                                                             \
        return opened(REAL(function)(path, flags, mode), path, flags, existed);                                        \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    if (fd >= 0 && fd < MAX_FILES)
        names[fd][0] = 0;
    return REAL(close)(fd);
}

/* Writes go through here: `offset` is where they go to. */
static ssize_t written(int fd, const void *bytes, size_t size, int64_t offset, int positioned) {
    const char *name = of(fd);
    switch (verdict('w', name)) {
    case 'i':
        errno = EIO;
        return -1;
    case 'n':
        errno = ENOSPC;
        return -1;
    case 'h':
        size = size / 2;
        if (half_done++ || !size) {
            errno = ENOSPC;
            return -1;
        }
        break;
    }
    ssize_t done = positioned ? REAL(pwrite)(fd, bytes, size, offset) : REAL(write)(fd, bytes, size);
    if (name && done > 0)
        note('w', name, offset, bytes, done);
    return done;
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t offset) { return written(fd, bytes, size, offset, 1); }
ssize_t pwrite64(int fd, const void *bytes, size_t size, off_t offset) { return written(fd, bytes, size, offset, 1); }

ssize_t write(int fd, const void *bytes, size_t size) {
    if (!of(fd))
        return REAL(write)(fd, bytes, size);
    int appending = fcntl(fd, F_GETFL) & O_APPEND;
    return written(fd, bytes, size, lseek(fd, 0, appending ? SEEK_END : SEEK_CUR), 0);
}

#define TRUNCATE(function)                                                                                             \
    int function(int fd, off_t length) {                                                                               \
        int done = REAL(function)(fd, length);                                                                         \
        if (!done && of(fd))                                                                                           \
            note('t', of(fd), length, NULL, 0);                                                                        \
        return done;                                                                                                   \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define SYNC(function)                                                                                                 \
    int function(int fd) {                                                                                             \
        const char *name = of(fd);                                                                                     \
        switch (verdict('s', name)) {                                                                                  \
        case 'i':                                                                                                      \
            errno = EIO;                                                                                               \
            return -1;                                                                                                 \
        case 'n':                                                                                                      \
        case 'h':                                                                                                      \
            errno = ENOSPC;                                                                                            \
            return -1;                                                                                                 \
        }                                                                                                              \
        int done = REAL(function)(fd);                                                                                 \
        if (!done && name)                                                                                             \
            note(name[0] == '/' ? 'd' : 's', name, 0, NULL, 0);                                                        \
        return done;                                                                                                   \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    int done = REAL(unlink)(path);
    if (!done && inside(path))
        note('u', inside(path), 0, NULL, 0);
    return done;
}
