/* A file system that fails by schedule: loaded before libc, see faults.py, which writes the schedule.

A line of the schedule: OPERATION FAULT AFTER COUNT PATTERN. The calls of an operation on paths that match the pattern
(fnmatch, absolute) are counted in each process; those after the first AFTER, COUNT of them (-1: all), fail. FAULT is an
errno, "kill" (SIGKILL at this call), "stall" (the call waits until the schedule changes) or "short" (a write takes half
of its bytes). "clock SECONDS 0 -1 *" moves the time of day. The schedule is read again when its file changes. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RULES = 32, STALL = -1, KILL = -2, SHORT = -3 };

struct rule { char op[16], pattern[PATH_MAX]; long fault, after, count, seen; };

static struct rule rules[MAX_RULES];
static int num_rules;
static struct timespec changed;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); real; })

static void read_schedule(void) {
  const char *path = getenv("FAULTS");
  struct stat now;
  num_rules = path && syscall(SYS_newfstatat, AT_FDCWD, path, &now, 0) == 0 ? num_rules : 0;
  if (!path || syscall(SYS_newfstatat, AT_FDCWD, path, &now, 0)) return;
  if (now.st_mtim.tv_sec == changed.tv_sec && now.st_mtim.tv_nsec == changed.tv_nsec) return;
  changed = now.st_mtim;
  num_rules = 0;
  static char text[1 << 16];  /* not on the stack: threads of libraries have small ones */
  int file = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
  long size = file < 0 ? 0 : syscall(SYS_read, file, text, sizeof text - 1);
  if (file >= 0) syscall(SYS_close, file);
  text[size < 0 ? 0 : size] = 0;
  char *rest, *line = strtok_r(text, "\n", &rest);
  for (; line && num_rules < MAX_RULES; line = strtok_r(NULL, "\n", &rest)) {
    struct rule *rule = &rules[num_rules];
    char fault[32];
    if (sscanf(line, "%15s %31s %ld %ld %4095[^\n]", rule->op, fault, &rule->after, &rule->count, rule->pattern) != 5)
      continue;
    rule->fault = !strcmp(fault, "stall") ? STALL : !strcmp(fault, "kill") ? KILL : !strcmp(fault, "short") ? SHORT
                  : strtol(fault, NULL, 10);
    rule->seen = 0;
    num_rules++;
  }
}

/* Returns the fault of this call: 0, an errno, or SHORT. Waits out a stall, and does not return from a kill. */
static long fault_of(const char *op, const char *path) {
  for (;;) {
    long fault = 0;
    pthread_mutex_lock(&mutex);
    read_schedule();
    for (int i = 0; i < num_rules && !fault; i++) {
      struct rule *rule = &rules[i];
      if (strcmp(rule->op, op) || fnmatch(rule->pattern, path, 0)) continue;
      if (rule->fault == STALL) {
        if (rule->seen >= rule->after) fault = STALL; else rule->seen++;
        continue;
      }
      long number = rule->seen++;
      if (number >= rule->after && (rule->count < 0 || number < rule->after + rule->count)) fault = rule->fault;
    }
    pthread_mutex_unlock(&mutex);
    if (fault == KILL) kill(getpid(), SIGKILL);
    if (fault != STALL) return fault;
    struct timespec pause = {0, 50 * 1000 * 1000};
    nanosleep(&pause, NULL);
  }
}

/* Another thread may hold the lock while a process is forked; the child has no thread that would release it. */
static void unlock_child(void) { pthread_mutex_init(&mutex, NULL); }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, unlock_child); }

static int has_rules(void) {
  const char *path = getenv("FAULTS");
  return path && *path;
}

static const char *absolute(int folder, const char *path, char *into) {
  char link[64];
  if (!path || path[0] == '/') return path ? path : "";
  if (folder == AT_FDCWD) { if (!getcwd(into, PATH_MAX)) return path; }
  else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, into, PATH_MAX - 1);
    if (size < 0) return path;
    into[size] = 0;
  }
  size_t size = strlen(into);
  if (*path) snprintf(into + size, PATH_MAX - size, "/%s", path);
  return into;
}

/* Sockets and pipes never fail: a signal handler writes to one, and must not wait for the lock. */
static long fault_at(const char *op, int folder, const char *path) {
  static __thread char into[PATH_MAX];
  const char *place = absolute(folder, path, into);
  return place[0] == '/' ? fault_of(op, place) : 0;
}

#define FAIL(op, folder, path, result) do { \
  if (has_rules()) { int before = errno; long fault = fault_at(op, folder, path); \
    if (fault > 0) { errno = fault; return result; } errno = before; } } while (0)

#define FAIL_FD(op, fd, result) FAIL(op, fd, "", result)

#define OPEN(name) int name(const char *path, int flags, ...) { \
  va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list); \
  FAIL(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", AT_FDCWD, path, -1); \
  return REAL(name)(path, flags, mode); }
OPEN(open) OPEN(open64)
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
  va_list list; va_start(list, flags); mode_t mode = va_arg(list, int); va_end(list); \
  FAIL(flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open", folder, path, -1); \
  return REAL(name)(folder, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)
DIR *opendir(const char *path) { FAIL("list", AT_FDCWD, path, NULL); return REAL(opendir)(path); }

ssize_t read(int fd, void *to, size_t size) { FAIL_FD("read", fd, -1); return REAL(read)(fd, to, size); }
ssize_t pread(int fd, void *to, size_t size, off_t at) { FAIL_FD("read", fd, -1); return REAL(pread)(fd, to, size, at); }
ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
  FAIL_FD("read", fd, -1); return REAL(pread64)(fd, to, size, at); }
ssize_t readv(int fd, const struct iovec *to, int count) { FAIL_FD("read", fd, -1); return REAL(readv)(fd, to, count); }

/* A write may be cut: half of the bytes are taken, as on a disk that becomes full. */
#define WRITE(fd, size, whole, part) do { if (has_rules()) { int before = errno; long fault = fault_at("write", fd, ""); \
  if (fault > 0) { errno = fault; return -1; } \
  errno = before; \
  if (fault == SHORT && (size) > 1) return part; } return whole; } while (0)
ssize_t write(int fd, const void *from, size_t size) {
  WRITE(fd, size, REAL(write)(fd, from, size), REAL(write)(fd, from, size / 2)); }
ssize_t pwrite(int fd, const void *from, size_t size, off_t at) {
  WRITE(fd, size, REAL(pwrite)(fd, from, size, at), REAL(pwrite)(fd, from, size / 2, at)); }
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t at) {
  WRITE(fd, size, REAL(pwrite64)(fd, from, size, at), REAL(pwrite64)(fd, from, size / 2, at)); }
ssize_t writev(int fd, const struct iovec *from, int count) {
  WRITE(fd, count, REAL(writev)(fd, from, count), REAL(writev)(fd, from, count / 2)); }
int fsync(int fd) { FAIL_FD("sync", fd, -1); return REAL(fsync)(fd); }
int fdatasync(int fd) { FAIL_FD("sync", fd, -1); return REAL(fdatasync)(fd); }

int rename(const char *from, const char *to) { FAIL("rename", AT_FDCWD, to, -1); return REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { FAIL("rename", b, to, -1); return REAL(renameat)(a, from, b, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  FAIL("rename", b, to, -1); return REAL(renameat2)(a, from, b, to, flags); }
int unlink(const char *path) { FAIL("remove", AT_FDCWD, path, -1); return REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) { FAIL("remove", folder, path, -1); return REAL(unlinkat)(folder, path, flags); }
int rmdir(const char *path) { FAIL("remove", AT_FDCWD, path, -1); return REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { FAIL("create", AT_FDCWD, path, -1); return REAL(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { FAIL("create", folder, path, -1); return REAL(mkdirat)(folder, path, mode); }

int stat(const char *path, struct stat *to) { FAIL("stat", AT_FDCWD, path, -1); return REAL(stat)(path, to); }
int stat64(const char *path, struct stat64 *to) { FAIL("stat", AT_FDCWD, path, -1); return REAL(stat64)(path, to); }
int lstat(const char *path, struct stat *to) { FAIL("stat", AT_FDCWD, path, -1); return REAL(lstat)(path, to); }
int lstat64(const char *path, struct stat64 *to) { FAIL("stat", AT_FDCWD, path, -1); return REAL(lstat64)(path, to); }
int fstatat(int folder, const char *path, struct stat *to, int flags) {
  FAIL("stat", folder, path, -1); return REAL(fstatat)(folder, path, to, flags); }
int fstatat64(int folder, const char *path, struct stat64 *to, int flags) {
  FAIL("stat", folder, path, -1); return REAL(fstatat64)(folder, path, to, flags); }
int statx(int folder, const char *path, int flags, unsigned mask, struct statx *to) {
  FAIL("stat", folder, path, -1); return REAL(statx)(folder, path, flags, mask, to); }

int flock(int fd, int operation) { FAIL_FD("lock", fd, -1); return REAL(flock)(fd, operation); }
#define FCNTL(name) int name(int fd, int command, ...) { \
  va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list); \
  if (command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW) FAIL_FD("lock", fd, -1); \
  return REAL(name)(fd, command, argument); }
FCNTL(fcntl) FCNTL(fcntl64)

static long moved(void) {
  long seconds = 0;
  if (!has_rules()) return 0;
  pthread_mutex_lock(&mutex);
  read_schedule();
  for (int i = 0; i < num_rules; i++) if (!strcmp(rules[i].op, "clock")) seconds += rules[i].fault;
  pthread_mutex_unlock(&mutex);
  return seconds;
}
int clock_gettime(clockid_t clock, struct timespec *to) {
  int result = REAL(clock_gettime)(clock, to);
  if (clock == CLOCK_REALTIME) to->tv_sec += moved();
  return result;
}
time_t time(time_t *to) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (to) *to = now.tv_sec;
  return now.tv_sec;
}
