/* Which instructions of user mode can be trapped on this host, and which run unseen.
 *
 *     make -C bench/direct
 *
 * Direct execution (docs/design/direct-execution.md) runs a guest's user code on the
 * host processor, so whatever does not trap shows the host instead of the guest. Each
 * instruction runs in a child of its own with all traps on that Linux offers: time-stamp
 * counter and CPUID faulting, a seccomp filter that traps every system call. */
#define _GNU_SOURCE
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_CPUID = 0x1012 }; /* ARCH_SET_CPUID of arch_prctl */

/* Code without a stack frame of its own: bytes, then `ret`. What it leaves in rax is
   the result; where `memory` is set, what it stored at rdi. */
static const struct row {
    const char *name;
    uint8_t code[32];
    int length, memory;
} rows[] = {
    {"cpuid (leaf 0)", {0x53, 0x31, 0xc0, 0x31, 0xc9, 0x0f, 0xa2, 0x5b}, 8, 0},
    {"rdtsc", {0x0f, 0x31}, 2, 0},
    {"rdtscp", {0x0f, 0x01, 0xf9, 0x89, 0xc8}, 5, 0},
    {"rdpid rax", {0xf3, 0x0f, 0xc7, 0xf8}, 4, 0},
    {"rdpmc", {0x31, 0xc9, 0x0f, 0x33}, 4, 0},
    {"rdpru (MPERF)", {0x31, 0xc9, 0x0f, 0x01, 0xfd}, 5, 0},
    {"xgetbv (XCR0)", {0x31, 0xc9, 0x0f, 0x01, 0xd0}, 5, 0},
    {"rdpkru", {0x31, 0xc9, 0x0f, 0x01, 0xee}, 5, 0},
    {"sgdt [rdi]", {0x0f, 0x01, 0x07}, 3, 1},
    {"sidt [rdi]", {0x0f, 0x01, 0x0f}, 3, 1},
    {"sldt eax", {0x0f, 0x00, 0xc0}, 3, 0},
    {"str eax", {0x0f, 0x00, 0xc8}, 3, 0},
    {"smsw eax", {0x0f, 0x01, 0xe0}, 3, 0},
    {"lar eax, 0x33", {0xb9, 0x33, 0, 0, 0, 0x0f, 0x02, 0xc1}, 8, 0},
    {"lsl eax, 0x7b (processor number)", {0xb9, 0x7b, 0, 0, 0, 0x0f, 0x03, 0xc1}, 8, 0},
    {"mov eax, cs", {0x8c, 0xc8}, 2, 0},
    {"mov eax, ss", {0x8c, 0xd0}, 2, 0},
    {"mov ds, 0x2b", {0xb9, 0x2b, 0, 0, 0, 0x8e, 0xd9, 0x8c, 0xd8, 0x31, 0xc9, 0x8e, 0xd9}, 13, 0},
    {"mov ds, 0x10 (a kernel's)", {0xb9, 0x10, 0, 0, 0, 0x8e, 0xd9}, 7, 0},
    {"pushf; pop rax", {0x9c, 0x58}, 2, 0},
    {"push 0x3002; popf; pushf (IOPL)", {0x68, 2, 0x32, 0, 0, 0x9d, 0x9c, 0x58}, 8, 0},
    {"rdfsbase rax", {0xf3, 0x48, 0x0f, 0xae, 0xc0}, 5, 0},
    {"rdgsbase rax", {0xf3, 0x48, 0x0f, 0xae, 0xc8}, 5, 0},
    {"syscall", {0xb8, 39, 0, 0, 0, 0x0f, 0x05}, 7, 0},
    {"int 0x80", {0xb8, 20, 0, 0, 0, 0xcd, 0x80}, 7, 0},
    {"sysenter", {0x0f, 0x34}, 2, 0},
    {"int 0x2e", {0xcd, 0x2e}, 2, 0},
    {"int3", {0xcc}, 1, 0},
    {"int1", {0xf1}, 1, 0},
    {"call 0xffffffffff600000 (vsyscall)", {0x48, 0xc7, 0xc0, 0, 0, 0x60, 0xff, 0x31, 0xff, 0x31, 0xf6, 0xff, 0xd0}, 13, 0},
    {"hlt", {0xf4}, 1, 0},
    {"cli", {0xfa}, 1, 0},
    {"in al, dx", {0xec}, 1, 0},
    {"mov rax, cr0", {0x0f, 0x20, 0xc0}, 3, 0},
    {"vmcall", {0x0f, 0x01, 0xc1}, 3, 0},
    {"vmmcall", {0x0f, 0x01, 0xd9}, 3, 0},
    {"monitorx; mwaitx", {0x48, 0x89, 0xf8, 0x31, 0xc9, 0x31, 0xd2, 0x0f, 0x01, 0xfa}, 10, 0},
    {"umonitor rdi", {0xf3, 0x0f, 0xae, 0xf7}, 4, 0},
    {"far jump to 0x23 (32-bit code) and back",
     {0xe8, 0, 0, 0, 0,             /* call next */
      0x58,                         /* pop rax */
      0x48, 0x83, 0xc0, 0x0c,       /* add rax, 12 */
      0x6a, 0x23, 0x50, 0x48, 0xcb, /* push 0x23; push rax; retfq */
      0x90, 0x90,
      0xf4},                        /* hlt, in 32-bit code */
     18, 0},
};

static uint64_t *out; /* shared with the children */

static void caught(int signal, siginfo_t *info, void *context) {
    ucontext_t *c = context;
    out[0] = signal;
    out[1] = c->uc_mcontext.gregs[REG_TRAPNO];
    out[2] = (uint64_t)c->uc_mcontext.gregs[REG_CSGSFS] & 0xffff;
    (void)info;
    syscall(SYS_exit_group, 3);
}

static void trap_calls(void) {
    /* All but exit_group of this program's. */
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) _exit(2);
}

static void child(const struct row *r, int cpuid_traps) {
    static const int signals[] = {SIGSEGV, SIGILL, SIGTRAP, SIGSYS, SIGBUS, SIGFPE};
    /* Low, so that 32-bit code reaches it, its stack included. */
    uint8_t *code = mmap((void *)0x10000000, 0x4000, PROT_READ | PROT_WRITE | PROT_EXEC,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memcpy(code, r->code, r->length);
    code[r->length] = 0xc3;
    stack_t stack = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    sigaltstack(&stack, NULL);
    for (size_t n = 0; n < sizeof signals / sizeof *signals; n++) {
        struct sigaction a = {.sa_sigaction = caught, .sa_flags = SA_SIGINFO | SA_ONSTACK};
        sigaction(signals[n], &a, NULL);
    }
    if (cpuid_traps) syscall(SYS_arch_prctl, ARCH_CPUID, 0);
    prctl(PR_SET_TSC, PR_TSC_SIGSEGV);
    trap_calls();
    uint64_t result, *memory = (uint64_t *)(code + 0x1000);
    void *top = code + 0x3000;
    asm volatile("mov %%rsp, %%rbx; mov %2, %%rsp; call *%1; mov %%rbx, %%rsp"
                 : "=a"(result)
                 : "r"(code), "r"(top), "D"(memory)
                 : "rbx", "rcx", "rdx", "rsi", "r11", "memory", "cc");
    out[3] = r->memory ? memory[0] >> 16 : result;
    syscall(SYS_exit_group, 0);
}

int main(void) {
    out = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    int cpuid_traps = syscall(SYS_arch_prctl, ARCH_CPUID, 0) == 0;
    if (cpuid_traps) syscall(SYS_arch_prctl, ARCH_CPUID, 1);
    printf("\nUser-mode instructions, all traps on (CPUID faulting: %s)\n", cpuid_traps ? "yes" : "not on this host");
    fflush(stdout);
    for (size_t n = 0; n < sizeof rows / sizeof *rows; n++) {
        memset(out, 0, 64);
        pid_t pid = fork();
        if (pid == 0) child(&rows[n], cpuid_traps);
        int status;
        waitpid(pid, &status, 0);
        printf("  %-42s ", rows[n].name);
        if (WIFSIGNALED(status)) printf("killed by signal %d\n", WTERMSIG(status));
        else if (WEXITSTATUS(status) == 3)
            printf("traps: SIG%s, vector %lu, cs %#lx\n", sigabbrev_np(out[0]), out[1], out[2]);
        else printf("RUNS UNSEEN: %#lx\n", out[3]);
    }
    return 0;
}
