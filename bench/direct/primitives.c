/* What the host's ways into a sandboxed process and back cost.
 *
 *     make -C bench/direct
 *
 * Direct execution would run a guest's user code natively in a process of its own and
 * come back to the engine for each system call, page fault and interrupt of the guest
 * (docs/design/direct-execution.md). Each row measures one primitive of that: the best
 * of ROUNDS averages, wall time, since the work is spread over two processes. "Same
 * core" pins both to one processor, "other core" gives each its own.
 *
 * Every sandbox is a forked child that is killed when its row is done.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS _IOW('!', 4, uint64_t)
#endif
#ifndef PTRACE_SYSEMU
#define PTRACE_SYSEMU 31
#endif
#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif

enum { ROUNDS = 40, CALLS = 2000, PAGES = 4096, PAGE = 4096 };

/* Where "guest" code and data lie: low, so that all else can be told from them. */
#define GUEST_CODE 0x10000000ul
#define GUEST_DATA 0x100000000ul

static int memory; /* memfd that stands for guest RAM, PAGES long */

static void die(const char *what) {
    fprintf(stderr, "primitives: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    if (sched_setaffinity(0, sizeof set, &set)) die("sched_setaffinity");
}

static void heading(const char *text) { printf("\n%s\n", text); }

static void row(const char *name, double ns) {
    printf("  %-66s %8.2f us\n", name, ns / 1000);
    fflush(stdout);
}

/* Best average of `body(n)` in nanoseconds a call. */
static double best(void (*body)(long), long n) {
    double least = 1e18;
    body(n / 10 + 1);
    for (int r = 0; r < ROUNDS; r++) {
        double t = now();
        body(n);
        t = (now() - t) / n;
        if (t < least) least = t;
    }
    return least;
}

/* --- guest code ----------------------------------------------------------------- */

static long (*guest_call)(void);    /* a system call (getpid) */
static void (*guest_touch)(void *); /* a store */

static void make_guest_code(void) {
    static const uint8_t call[] = {0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xc3};
    static const uint8_t touch[] = {0xc6, 0x07, 1, 0xc3}; /* mov byte [rdi], 1; ret */
    uint8_t *p = mmap((void *)GUEST_CODE, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    memcpy(p, call, sizeof call);
    memcpy(p + 64, touch, sizeof touch);
    guest_call = (void *)p;
    guest_touch = (void *)(p + 64);
}

static void on(int signal, void (*handler)(int, siginfo_t *, void *)) {
    struct sigaction a = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    if (sigaction(signal, &a, NULL)) die("sigaction");
}

/* --- hand-over through shared memory ----------------------------------------------- */

enum { SANDBOX, ENGINE };

/* What the processes share. `turn` says who runs. */
static struct shared {
    _Alignas(64) _Atomic uint32_t turn;
    _Alignas(64) _Atomic uint32_t spin; /* looks before a futex wait; both sides */
    _Alignas(64) _Atomic uint32_t flag;
    greg_t registers[23];
    uint64_t address;
} *shared;

static void futex(_Atomic uint32_t *word, int op, uint32_t value) {
    syscall(SYS_futex, word, op, value, NULL, NULL, 0);
}

static void wait_turn(uint32_t mine) {
    for (uint32_t n = shared->spin; n; n--) {
        if (shared->turn == mine) return;
        _mm_pause();
    }
    while (shared->turn != mine) futex(&shared->turn, FUTEX_WAIT, !mine);
}

static void give_turn(uint32_t other) {
    shared->turn = other;
    /* Who spins for ever needs no waking. */
    if (shared->spin != UINT32_MAX) futex(&shared->turn, FUTEX_WAKE, 1);
}

/* The stub: what runs in the sandbox when guest code traps. */
static void stub_trap(int signal, siginfo_t *info, void *context) {
    ucontext_t *c = context;
    memcpy(shared->registers, c->uc_mcontext.gregs, sizeof shared->registers);
    shared->address = (uint64_t)info->si_addr;
    give_turn(ENGINE);
    wait_turn(SANDBOX);
    memcpy(c->uc_mcontext.gregs, shared->registers, sizeof shared->registers);
    (void)signal;
}

static void engine_turns(long n) {
    while (n--) {
        give_turn(SANDBOX);
        wait_turn(ENGINE);
        shared->registers[REG_RAX] = 1;
    }
}

static void stop(pid_t child) {
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

static pid_t sandbox(int core, void (*body)(void)) {
    pid_t child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(core);
        body();
        _exit(0);
    }
    return child;
}

/* Seccomp answers `action` to what lies in guest code, and allows all else. */
static long guard(uint32_t action, unsigned flags) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer) + 4),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, instruction_pointer)),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, GUEST_CODE + PAGE, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static void dispatch_on(void) {
    /* Allowed without dispatch: everything above guest code. */
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 2 * GUEST_CODE, 0x7fff00000000, NULL))
        die("syscall user dispatch");
}

static void calls_by_seccomp(void) {
    on(SIGSYS, stub_trap);
    if (guard(SECCOMP_RET_TRAP, 0)) die("seccomp");
    for (;;) guest_call();
}

static void calls_by_dispatch(void) {
    on(SIGSYS, stub_trap);
    dispatch_on();
    for (;;) guest_call();
}

static void calls_by_dispatch_zmm(void) {
    on(SIGSYS, stub_trap);
    dispatch_on();
    for (;;) {
        if (__builtin_cpu_supports("avx512f")) asm volatile("vpternlogd $255, %%zmm16, %%zmm16, %%zmm16" ::: "memory");
        else asm volatile("vpcmpeqd %%ymm1, %%ymm1, %%ymm1" ::: "memory");
        guest_call();
    }
}

static void bare_turns(void) {
    for (;;) {
        wait_turn(SANDBOX);
        give_turn(ENGINE);
    }
}

static void hand_over(const char *name, void (*body)(void), int core, uint32_t spin) {
    shared->turn = ENGINE;
    shared->spin = spin;
    pin(0);
    pid_t child = sandbox(core, body);
    /* The child's first trap takes the turn by itself. */
    if (body != bare_turns) {
        shared->turn = SANDBOX;
        wait_turn(ENGINE);
    }
    row(name, best(engine_turns, CALLS));
    stop(child);
}

/* --- ptrace ------------------------------------------------------------------------ */

static pid_t traced;
static int trace_vectors;

static void trace_wait(int wanted) {
    int status;
    if (waitpid(traced, &status, __WALL) < 0 || !WIFSTOPPED(status)) die("waitpid");
    if (WSTOPSIG(status) != wanted) {
        fprintf(stderr, "primitives: stopped by signal %d\n", WSTOPSIG(status));
        exit(1);
    }
}

static void trace_calls(long n) {
    struct user_regs_struct r;
    uint8_t vectors[8192];
    while (n--) {
        if (ptrace(PTRACE_SYSEMU, traced, 0, 0)) die("PTRACE_SYSEMU");
        trace_wait(SIGTRAP);
        ptrace(PTRACE_GETREGS, traced, 0, &r);
        if (trace_vectors) {
            struct iovec v = {vectors, sizeof vectors};
            ptrace(PTRACE_GETREGSET, traced, 0x202, &v);
            ptrace(PTRACE_SETREGSET, traced, 0x202, &v);
        }
        r.rax = 1;
        ptrace(PTRACE_SETREGS, traced, 0, &r);
    }
}

static void trace_faults(long n) {
    struct user_regs_struct r;
    siginfo_t info;
    while (n--) {
        if (ptrace(PTRACE_SYSEMU, traced, 0, 0)) die("PTRACE_SYSEMU");
        trace_wait(SIGSEGV);
        ptrace(PTRACE_GETREGS, traced, 0, &r);
        ptrace(PTRACE_GETSIGINFO, traced, 0, &info);
        ptrace(PTRACE_SETREGS, traced, 0, &r);
    }
}

static void traced_calls(void) {
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    for (;;) guest_call();
}

static void traced_faults(void) {
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    guest_touch((void *)GUEST_DATA);
}

static void trace(const char *name, int core, void (*body)(void), void (*drive)(long)) {
    pin(0);
    traced = sandbox(core, body);
    trace_wait(SIGSTOP);
    row(name, best(drive, CALLS / 2));
    stop(traced);
}

/* --- seccomp's user notification ------------------------------------------------------ */

static int notify;

static void notified_calls(void) {
    /* The listener is installed by the parent's copy of the descriptor: a thread of
       this process would do, but fork keeps the address spaces apart. */
    long fd = guard(SECCOMP_RET_USER_NOTIF, SECCOMP_FILTER_FLAG_NEW_LISTENER);
    if (fd < 0) die("seccomp listener");
    shared->flag = fd + 1;
    futex(&shared->flag, FUTEX_WAKE, 1);
    for (;;) guest_call();
}

static void notified(long n) {
    struct seccomp_notif_resp answer;
    struct seccomp_notif request;
    while (n--) {
        memset(&request, 0, sizeof request);
        if (ioctl(notify, SECCOMP_IOCTL_NOTIF_RECV, &request)) die("NOTIF_RECV");
        memset(&answer, 0, sizeof answer);
        answer.id = request.id;
        answer.val = 1;
        if (ioctl(notify, SECCOMP_IOCTL_NOTIF_SEND, &answer)) die("NOTIF_SEND");
    }
}

static void notification(const char *name, int core, int sync) {
    pin(0);
    shared->flag = 0;
    pid_t child = sandbox(core, notified_calls);
    while (!shared->flag) futex(&shared->flag, FUTEX_WAIT, 0);
    int pidfd = syscall(SYS_pidfd_open, child, 0);
    notify = syscall(SYS_pidfd_getfd, pidfd, shared->flag - 1, 0);
    if (notify < 0) die("pidfd_getfd");
    if (sync && ioctl(notify, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)) {
        printf("  %-66s %8s\n", name, "none");
    } else {
        row(name, best(notified, CALLS));
    }
    close(notify);
    close(pidfd);
    stop(child);
}

/* --- within one process ------------------------------------------------------------- */

static void plain_calls(long n) { while (n--) guest_call(); }

static void answer_call(int s, siginfo_t *i, void *context) {
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RAX] = 1;
    (void)s, (void)i;
}

static void skip_store(int s, siginfo_t *i, void *context) {
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 3;
    (void)s, (void)i;
}

static void plain_faults(long n) { while (n--) guest_touch((void *)GUEST_DATA); }

/* One page of `memory` at `page` of the guest's addresses; far from its neighbours in
   the file, so that each mapping stays its own. */
static void map_page(long page, int populate) {
    void *p = mmap((void *)(GUEST_DATA + page * PAGE), PAGE, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED | (populate ? MAP_POPULATE : 0), memory,
                   (page * 1237 % PAGES) * PAGE);
    if (p == MAP_FAILED) die("mmap");
}

static void map_on_fault(int s, siginfo_t *info, void *context) {
    map_page(((uint64_t)info->si_addr - GUEST_DATA) / PAGE, 1);
    (void)s, (void)context;
}

/* --- memory ------------------------------------------------------------------------ */

static void unmap_all(void) { munmap((void *)GUEST_DATA, (size_t)PAGES * PAGE); }

static double each_page(void (*step)(long), void (*before)(void), void (*after)(void)) {
    double least = 1e18;
    for (int r = 0; r < ROUNDS / 4; r++) {
        if (before) before();
        double t = now();
        for (long page = 0; page < PAGES; page++) step(page);
        t = (now() - t) / PAGES;
        if (after) after();
        if (t < least) least = t;
    }
    return least;
}

static void step_touch(long page) { guest_touch((void *)(GUEST_DATA + page * PAGE)); }
static void step_map(long page) { map_page(page, 0); }
static void step_map_touch(long page) { map_page(page, 0), step_touch(page); }
static void step_map_full(long page) { map_page(page, 1); }
static void step_unmap(long page) { munmap((void *)(GUEST_DATA + page * PAGE), PAGE); }
static void step_protect(long page) { mprotect((void *)(GUEST_DATA + page * PAGE), PAGE, PROT_READ); }
static void step_map16(long page) {
    if (page % 16) return;
    if (mmap((void *)(GUEST_DATA + page * PAGE), 16 * PAGE, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED | MAP_POPULATE, memory, page * PAGE) == MAP_FAILED)
        die("mmap");
}
static void all_mapped(void) {
    for (long page = 0; page < PAGES; page++) map_page(page, 1);
}
static void step_unmap_all(long page) { if (page == 0) unmap_all(); }

/* Minor faults of one large mapping, served by a process that holds its userfaultfd. */
static void touch_for_ever(void) {
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM};
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) die("userfaultfd");
    shared->flag = fd + 1;
    futex(&shared->flag, FUTEX_WAKE, 1);
    for (;;) {
        void *p = mmap((void *)GUEST_DATA, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_FIXED, memory, 0);
        struct uffdio_register range = {.range = {(uint64_t)p, (uint64_t)PAGES * PAGE},
                                        .mode = UFFDIO_REGISTER_MODE_MINOR};
        if (ioctl(fd, UFFDIO_REGISTER, &range)) die("UFFDIO_REGISTER");
        for (long page = 0; page < PAGES; page++) step_touch(page);
    }
}

static int fault_fd;

static void serve_faults(long n) {
    struct uffd_msg m;
    while (n--) {
        if (read(fault_fd, &m, sizeof m) != sizeof m) die("read of userfaultfd");
        struct uffdio_continue c = {.range = {m.arg.pagefault.address & ~(uint64_t)(PAGE - 1), PAGE}};
        if (ioctl(fault_fd, UFFDIO_CONTINUE, &c)) die("UFFDIO_CONTINUE");
    }
}

static void user_faults(const char *name, int core) {
    pin(0);
    shared->flag = 0;
    pid_t child = sandbox(core, touch_for_ever);
    while (!shared->flag) futex(&shared->flag, FUTEX_WAIT, 0);
    int pidfd = syscall(SYS_pidfd_open, child, 0);
    fault_fd = syscall(SYS_pidfd_getfd, pidfd, shared->flag - 1, 0);
    if (fault_fd < 0) die("pidfd_getfd");
    row(name, best(serve_faults, CALLS));
    stop(child);
    close(fault_fd);
    close(pidfd);
}

/* A trap of a page fault whose page the stub itself maps: the engine only answers. */
static void stub_fault(int signal, siginfo_t *info, void *context) {
    stub_trap(signal, info, context);
    map_page((shared->address - GUEST_DATA) / PAGE, 1);
}

static void faults_by_stub(void) {
    on(SIGSEGV, stub_fault);
    for (;;) {
        for (long page = 0; page < PAGES; page++) step_touch(page);
        unmap_all();
    }
}

/* --- stopping a sandbox from outside ---------------------------------------------- */

static void on_kick(int s, siginfo_t *i, void *context) {
    stub_trap(s, i, context);
}

static void spin_for_ever(void) {
    on(SIGUSR1, on_kick);
    shared->flag = 1;
    for (;;) asm volatile("pause");
}

static pid_t kicked;

static void kicks(long n) {
    while (n--) {
        syscall(SYS_tgkill, kicked, kicked, SIGUSR1);
        wait_turn(ENGINE);
        give_turn(SANDBOX);
    }
}

static void kick(const char *name, int core, uint32_t spin) {
    shared->turn = SANDBOX;
    shared->spin = spin;
    shared->flag = 0;
    pin(0);
    kicked = sandbox(core, spin_for_ever);
    while (!shared->flag) sched_yield();
    row(name, best(kicks, CALLS / 4));
    stop(kicked);
}

/* ----------------------------------------------------------------------------------- */

/* Rows that change the process for good run in a child. */
static void apart(void (*body)(void)) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        pin(0);
        body();
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) fprintf(stderr, "primitives: a row failed\n");
}

static void by_dispatch(void) {
    on(SIGSYS, answer_call);
    dispatch_on();
    row("system call: syscall user dispatch, SIGSYS, sigreturn", best(plain_calls, CALLS));
}

static void by_seccomp(void) {
    on(SIGSYS, answer_call);
    if (guard(SECCOMP_RET_TRAP, 0)) die("seccomp");
    row("system call: seccomp trap, SIGSYS, sigreturn", best(plain_calls, CALLS));
}

static void by_fault(void) {
    on(SIGSEGV, skip_store);
    row("page fault: SIGSEGV, sigreturn", best(plain_faults, CALLS));
    on(SIGSEGV, map_on_fault);
    row("page fault: SIGSEGV, mmap of a page, sigreturn", each_page(step_touch, unmap_all, NULL));
}

int main(void) {
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memory = memfd_create("guest", MFD_CLOEXEC);
    if (shared == MAP_FAILED || memory < 0 || ftruncate(memory, (off_t)PAGES * PAGE)) die("memory");
    char *ram = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    if (ram == MAP_FAILED) die("mmap");
    memset(ram, 1, (size_t)PAGES * PAGE);
    make_guest_code();
    int other = sysconf(_SC_NPROCESSORS_ONLN) > 1;

    heading("Within one process");
    row("system call, plain", best(plain_calls, 10 * CALLS));
    apart(by_dispatch);
    apart(by_seccomp);
    apart(by_fault);

    heading("There and back between two processes, no trap");
    hand_over("futex, same core", bare_turns, 0, 0);
    if (other) hand_over("futex, other core", bare_turns, 1, 0);
    if (other) hand_over("spinning, other core", bare_turns, 1, UINT32_MAX);

    heading("System call of the sandbox, answered by the engine, and back");
    trace("ptrace SYSEMU, GETREGS, SETREGS, same core", 0, traced_calls, trace_calls);
    if (other) trace("ptrace SYSEMU, GETREGS, SETREGS, other core", 1, traced_calls, trace_calls);
    trace_vectors = 1;
    trace("ptrace, with vector registers, same core", 0, traced_calls, trace_calls);
    notification("seccomp notification (no registers), same core", 0, 0);
    notification("seccomp notification (no registers), SYNC_WAKE_UP, same core", 0, 1);
    if (other) notification("seccomp notification (no registers), other core", 1, 0);
    hand_over("stub: seccomp trap, futex, same core", calls_by_seccomp, 0, 0);
    hand_over("stub: syscall user dispatch, futex, same core", calls_by_dispatch, 0, 0);
    hand_over("  the same, AVX-512 in use", calls_by_dispatch_zmm, 0, 0);
    if (other) {
        hand_over("stub: syscall user dispatch, futex, other core", calls_by_dispatch, 1, 0);
        hand_over("stub: syscall user dispatch, spinning, other core", calls_by_dispatch, 1, UINT32_MAX);
    }

    heading("Page fault of the sandbox");
    trace("ptrace, SIGSEGV stop, registers, same core (no mapping)", 0, traced_faults, trace_faults);
    hand_over("stub: SIGSEGV, futex, mmap of a page, same core", faults_by_stub, 0, 0);
    if (other) hand_over("stub: SIGSEGV, spinning, mmap of a page, other core", faults_by_stub, 1, UINT32_MAX);
    user_faults("userfaultfd, minor fault, UFFDIO_CONTINUE, same core", 0);
    if (other) user_faults("userfaultfd, minor fault, UFFDIO_CONTINUE, other core", 1);

    heading("Mappings, for each page");
    row("mmap of a page", each_page(step_map, unmap_all, NULL));
    row("mmap of a page, and the fault of its first use", each_page(step_map_touch, unmap_all, NULL));
    row("mmap of a page, populated", each_page(step_map_full, unmap_all, NULL));
    row("mmap of 16 pages together, populated", each_page(step_map16, unmap_all, NULL));
    row("mmap of a page over another, populated", each_page(step_map_full, all_mapped, NULL));
    row("mprotect of a page", each_page(step_protect, all_mapped, unmap_all));
    row("munmap of a page", each_page(step_unmap, all_mapped, NULL));
    row("munmap of all 4096 pages at once", each_page(step_unmap_all, all_mapped, NULL));

    heading("Stopping the sandbox: tgkill, handler, hand-over, and back");
    kick("futex, same core", 0, 0);
    if (other) kick("futex, other core", 1, 0);
    if (other) kick("spinning, other core", 1, UINT32_MAX);
    return 0;
}
