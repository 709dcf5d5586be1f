// Chooses the widest build of the kernels this processor runs, and deals their work to threads.
#include <stdlib.h>
#if defined(HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <thread>
#include <vector>

#include "kernels.h"

extern "C" {
extern const Kernels rankmamba_kernels_base;
#ifdef HAVE_AVX2
extern const Kernels rankmamba_kernels_avx2;
#endif
#ifdef HAVE_AVX512
extern const Kernels rankmamba_kernels_avx512;
#endif
#ifdef HAVE_AVX512BF16
extern const Kernels rankmamba_kernels_avx512bf16;
#endif
#ifdef HAVE_AMX
extern const Kernels rankmamba_kernels_amx;
#endif
}

namespace {

struct Build {
    const char *name;
    const Kernels *kernels;
};

#ifdef HAVE_AMX
// Whether the processor has matrix tiles for bfloat16, and Linux lets this process use them (it asks, since their state is large).
bool may_use_tiles() {
    constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (BF16 | TILES)) != (BF16 | TILES)) return false;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif

Build choose() {
#if defined(HAVE_AVX2) || defined(HAVE_AVX512)
    __builtin_cpu_init();
#endif
#ifdef HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        const bool pairs = __builtin_cpu_supports("avx512bf16");
#ifdef HAVE_AMX
        if (pairs && may_use_tiles()) return {"amx", &rankmamba_kernels_amx};
#endif
#ifdef HAVE_AVX512BF16
        if (pairs) return {"avx512bf16", &rankmamba_kernels_avx512bf16};
#endif
        return {"avx512", &rankmamba_kernels_avx512};
    }
#endif
#ifdef HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", &rankmamba_kernels_avx2};
#endif
    return {"base", &rankmamba_kernels_base};
}

const Build build = choose();

// libgomp's entry point for a parallel region, from the copy that torch has loaded: one pool of threads for both. May be null.
void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;

template <class Arguments>
struct Work {
    const Kernel<Arguments> &kernel;
    const Arguments &arguments;
    int64_t items, next;

    // Each thread takes the next piece until none is left: no thread numbers, and a slow core delays nobody.
    static void take(void *self) {
        Work &work = *(Work *)self;
        const size_t bytes = (work.kernel.workspace(work.arguments) * sizeof(float) + 63) / 64 * 64;
        void *space = bytes ? aligned_alloc(64, bytes) : nullptr;
        if (bytes && !space) abort();
        for (int64_t i; (i = __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED)) < work.items;)
            work.kernel.run(work.arguments, i, (float *)space);
        free(space);
    }
};

template <class Arguments>
void run(const Kernel<Arguments> &kernel, const Arguments &arguments, int threads) {
    Work<Arguments> work{kernel, arguments, kernel.items(arguments), 0};
    if (threads > work.items) threads = (int)work.items;
    if (threads <= 1) return Work<Arguments>::take(&work);
    if (gomp_parallel) return gomp_parallel(Work<Arguments>::take, &work, threads, 0);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(Work<Arguments>::take, &work);
    Work<Arguments>::take(&work);
    for (auto &thread : others) thread.join();
}

}  // namespace

#pragma GCC visibility push(default)  // the rest of the library stays private

extern "C" {
const char *rankmamba_build() { return build.name; }
int64_t rankmamba_block() { return build.kernels->block; }
int64_t rankmamba_tile() { return build.kernels->tile; }
int64_t rankmamba_item_rows() { return build.kernels->item_rows; }
int64_t rankmamba_taps() { return build.kernels->taps; }
void rankmamba_use_gomp(void *entry) { gomp_parallel = (decltype(gomp_parallel))entry; }

// One entry for each kernel, and the size of its arguments for the caller to check its own against.
#define ENTRY(name, Arguments)                                                                                        \
    void rankmamba_##name(const Arguments *arguments, int threads) { run(build.kernels->name, *arguments, threads); } \
    int64_t rankmamba_##name##_size() { return sizeof(Arguments); }
ENTRY(scan_forward, Scan)
ENTRY(scan_backward, Scan)
ENTRY(conv_forward, Conv)
ENTRY(conv_backward, Conv)
ENTRY(ssd_forward, SsdForward)
ENTRY(ssd_backward, SsdBackward)
ENTRY(norm_forward, Norm)
ENTRY(norm_backward, Norm)
ENTRY(attention, Attention)
ENTRY(attention_backward, Attention)
ENTRY(gelu_forward, Gelu)
ENTRY(gelu_backward, Gelu)
ENTRY(add_norm, AddNorm)
}
