/* Holds known values in every register a program can see, in a spin without system calls, until told to stop. */
#ifndef HOLD_H
#define HOLD_H
#include "subject.h"
#include <immintrin.h>

enum { GENERAL = 14, VECTOR_BYTES = 32 * 64, HELD_BYTES = GENERAL * 8 + VECTOR_BYTES + 8 * 8 };

/* in: pattern, stop flag, place for what was found. The layout of both blocks: 14 general registers, vector registers
 * (64 bytes apart at most), mask registers. The vector part is loaded first, since it needs rdi. */
typedef void holder(const void *pattern, _Atomic int *stop, void *found);
extern holder hold_sse, hold_avx, hold_avx512;

#define HOLD(name, load_vectors, store_vectors, clear)                                                                 \
    __asm__(".text\n.globl " #name "\n.type " #name ",@function\n" #name ":\n"                                         \
            "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\n"                                       \
            "push %rdx\nsub $112, %rsp\n" load_vectors                                                                 \
            "mov (%rdi), %rax\nmov 8(%rdi), %rbx\nmov 16(%rdi), %rcx\nmov 24(%rdi), %rdx\nmov 32(%rdi), %rbp\n"        \
            "mov 40(%rdi), %r8\nmov 48(%rdi), %r9\nmov 56(%rdi), %r10\nmov 64(%rdi), %r11\nmov 72(%rdi), %r12\n"       \
            "mov 80(%rdi), %r13\nmov 88(%rdi), %r14\nmov 96(%rdi), %r15\nmov 104(%rdi), %rdi\n"                        \
            "1: cmpl $0, (%rsi)\nje 1b\n"                                                                              \
            "mov %rax, (%rsp)\nmov %rbx, 8(%rsp)\nmov %rcx, 16(%rsp)\nmov %rdx, 24(%rsp)\nmov %rbp, 32(%rsp)\n"        \
            "mov %r8, 40(%rsp)\nmov %r9, 48(%rsp)\nmov %r10, 56(%rsp)\nmov %r11, 64(%rsp)\nmov %r12, 72(%rsp)\n"       \
            "mov %r13, 80(%rsp)\nmov %r14, 88(%rsp)\nmov %r15, 96(%rsp)\nmov %rdi, 104(%rsp)\n"                        \
            "mov 112(%rsp), %rdi\n" store_vectors                                                                      \
            "mov %rsp, %rsi\nmov $14, %ecx\ncld\nrep movsq\n" clear                                                    \
            "add $120, %rsp\n"                                                                                         \
            "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n")

#define LOW "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define ALL LOW ",16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"
HOLD(hold_sse, ".irp n," LOW "\nmovdqu 112+64*\\n(%rdi), %xmm\\n\n.endr\n",
     ".irp n," LOW "\nmovdqu %xmm\\n, 112+64*\\n(%rdi)\n.endr\n", "");
HOLD(hold_avx, ".irp n," LOW "\nvmovdqu 112+64*\\n(%rdi), %ymm\\n\n.endr\n",
     ".irp n," LOW "\nvmovdqu %ymm\\n, 112+64*\\n(%rdi)\n.endr\n", "vzeroupper\n");
HOLD(hold_avx512,
     ".irp n," ALL "\nvmovdqu64 112+64*\\n(%rdi), %zmm\\n\n.endr\n"
     ".irp n,1,2,3,4,5,6,7\nkmovw 2160+8*\\n(%rdi), %k\\n\n.endr\n",
     ".irp n," ALL "\nvmovdqu64 %zmm\\n, 112+64*\\n(%rdi)\n.endr\n"
     ".irp n,1,2,3,4,5,6,7\nkmovw %k\\n, 2160+8*\\n(%rdi)\n.endr\n",
     "vzeroupper\n");

/* Holds a pattern made from the seed until *stop, then CHECKs that all of it came back. */
static void hold(uint64_t seed, _Atomic int *stop) {
    _Alignas(64) uint64_t pattern[HELD_BYTES / 8], found[HELD_BYTES / 8];
    for (size_t i = 0; i < HELD_BYTES / 8; i++) pattern[i] = mix(seed + i);
    memset(found, 0, sizeof found);
    unsigned control = 0x1f80 | (seed % 4) << 13; /* all exceptions masked, one of four rounding modes */
    unsigned short x87 = 0x037f ^ (seed % 4) << 10, x87_found;
    _mm_setcsr(control);
    __asm__ volatile("fldcw %0" ::"m"(x87));
    size_t width, count;
    if (__builtin_cpu_supports("avx512f")) hold_avx512(pattern, stop, found), width = 64, count = 32;
    else if (__builtin_cpu_supports("avx")) hold_avx(pattern, stop, found), width = 32, count = 16;
    else hold_sse(pattern, stop, found), width = 16, count = 16;
    unsigned control_found = _mm_getcsr();
    __asm__ volatile("fnstcw %0" : "=m"(x87_found));
    unsigned short x87_usual = 0x037f;
    _mm_setcsr(0x1f80);
    __asm__ volatile("fldcw %0" ::"m"(x87_usual));

    for (int i = 0; i < GENERAL; i++)
        CHECK(pattern[i] == found[i], "general register %d holds %lx, not %lx", i, found[i], pattern[i]);
    for (size_t i = 0; i < count; i++)
        CHECK(!memcmp((char *)pattern + 112 + 64 * i, (char *)found + 112 + 64 * i, width), "vector register %zu changed", i);
    for (int i = 1; width == 64 && i < 8; i++)
        CHECK((uint16_t)pattern[270 + i] == (uint16_t)found[270 + i], "mask register %d changed", i);
    CHECK((control_found & 0xffc0) == control, "mxcsr is %x, not %x", control_found, control);
    CHECK(x87_found == x87, "x87 control word is %x, not %x", x87_found, x87);
}

/* A thread that holds registers, round after round. */
struct holding {
    _Atomic int stop, held, released; /* held: it is (about to be) in the spin; released counts the spins that ended */
    uint64_t seed;
    long rest_ms; /* between two spins */
};

static void *hold_for_ever(void *argument) {
    struct holding *mine = argument;
    for (;; mine->seed += 1000) {
        atomic_store(&mine->stop, 0);
        atomic_store(&mine->held, 1);
        hold(mine->seed, &mine->stop);
        atomic_fetch_add(&mine->released, 1);
        if (mine->rest_ms) doze(mine->rest_ms);
    }
    return NULL;
}

/* Ends the current spin, or the next of one that rests (which checks the registers), and waits until one that never rests is in
 * another. */
static void let_go(struct holding *one) {
    int before = atomic_load(&one->released);
    atomic_store(&one->held, 0);
    /* Again and again: at the beginning of a spin the flag is taken back. */
    CHECK(EVENTUALLY((atomic_store(&one->stop, 1), atomic_load(&one->released) > before)), "a register holder does not move");
    CHECK(one->rest_ms || EVENTUALLY(atomic_load(&one->held)), "a register holder does not begin again");
}
#endif
