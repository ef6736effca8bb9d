// Tensor cores and tensor copies of compute capability 9.0, for f16 and bf16: products of a warpgroup, tiles in shared
// memory in rows of 128 bytes, barriers that copies arrive at.
#pragma once

#include <cuda.h>

#include "mma.cuh"

__device__ inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and makes the phase last until so many bytes have been copied.
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait_for_phase(uint32_t barrier, uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nwait:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra wait;\n}" ::"r"(barrier), "r"(parity)
               : "memory");
}

// What threads have written to shared memory is there for products and tensor copies that follow.
__device__ inline void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void clear(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
// A barrier of some warps of a block; number 0 is __syncthreads.
__device__ inline void synchronize(uint32_t number, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Counts as there without waiting for the others.
__device__ inline void arrive_at(uint32_t number, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Copies a multiple of 16 bytes.
__device__ inline void copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Copies the box at (column, head, row) of a tensor.
__device__ inline void copy_box(uint32_t to, const CUtensorMap &map, uint32_t column, uint32_t head, uint32_t row,
                                uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
               "[%2];" ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(head), "r"(row)
               : "memory");
}

// As `copy_box`, to the same place in the blocks of the cluster whose bits are set in `blocks`; each one's barrier there
// sees what it gets.
__device__ inline void copy_box_to_all(uint32_t to, const CUtensorMap &map, uint32_t column, uint32_t head, uint32_t row,
                                       uint32_t barrier, uint16_t blocks) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(to), "l"(&map), "r"(barrier), "r"(column), "r"(head), "r"(row),
               "h"(blocks)
               : "memory");
}
// Copies a box from shared memory to (column, head, row) of a tensor, as part of a group of the thread.
__device__ inline void store_box(const CUtensorMap &map, uint32_t column, uint32_t head, uint32_t row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(from),
               "r"(column), "r"(head), "r"(row)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until what the thread's stores read may be written again.
__device__ inline void wait_for_stores_to_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ inline uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Arrives at the barrier at the same place in a block of the cluster.
__device__ inline void arrive_in(uint32_t block, uint32_t barrier) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(block)
               : "memory");
}

template <int REGISTERS> __device__ inline void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ inline void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// An operand in shared memory: columns of 64 values, each [rows, 64] with its 16 bytes swizzled over 8 rows. `stride`
// is the bytes from one column of 64 to the next, which a product asks for when its sum runs over rows.
__device__ inline uint64_t describe(uint32_t address, uint32_t stride) {
  constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_ROWS = uint64_t(1024 >> 4) << 32;
  return SWIZZLE_128 | EIGHT_ROWS | uint64_t(stride >> 4) << 16 | (address >> 4 & 0x3fff);
}

// Such an operand of 16 columns without swizzle, in columns of 8 values, `stride` bytes apart.
__device__ inline uint64_t describe_columns(uint32_t address, uint32_t stride) {
  constexpr uint64_t EIGHT_ROWS = uint64_t(128 >> 4) << 32;
  return EIGHT_ROWS | uint64_t(stride >> 4) << 16 | (address >> 4 & 0x3fff);
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until no more than N groups of products run.
template <int N> __device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving uses of accumulators across.
template <int N> __device__ inline void pin(float (&c)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
      asm volatile("" : "+f"(c[i][j])::"memory");
}

// c [64, 8 N] (+)= a b^T, sums over 16 columns: rows of a and b lie in shared memory, or those of a in registers.
// c [64, 8 N]  += a b,    sums over 16 rows of b: a in registers.
template <typename T, int N> struct Products;

#define C4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define C16(i) C4(i), C4(i + 1), C4(i + 2), C4(i + 3)
#define C32(i) C16(i), C16(i + 4)
#define C64(i) C32(i), C32(i + 8)
#define NAMES_32                                                                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
  "%25, %26, %27, %28, %29, %30, %31"
#define NAMES_64                                                                                                       \
  NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "    \
           "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCTS(T, type, N, n, C, NAMES, P0, P1, P2, P3, P4, P5)                                                      \
  template <> struct Products<T, N> {                                                                                  \
    static __device__ void rows_by_rows(float (&c)[N][4], uint64_t a, uint64_t b, bool is_added) {                     \
      asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, " P2 ", 0;\n"                                             \
                   "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" NAMES "}, " P0 ", " P1          \
                   ", added, 1, 1, 0, 0;\n}"                                                                           \
                   : C(0)                                                                                              \
                   : "l"(a), "l"(b), "r"(int(is_added)));                                                              \
    }                                                                                                                  \
    static __device__ void registers_by_rows(float (&c)[N][4], const uint32_t(&a)[4], uint64_t b, bool is_added) {     \
      asm volatile("{\n.reg .pred added;\nsetp.ne.b32 added, " P5 ", 0;\n"                                             \
                   "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" NAMES "}, {" P0 ", " P1 ", " P2 \
                   ", " P3 "}, " P4 ", added, 1, 1, 0;\n}"                                                             \
                   : C(0)                                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(is_added)));                          \
    }                                                                                                                  \
    static __device__ void registers_by_columns(float (&c)[N][4], const uint32_t(&a)[4], uint64_t b) {                 \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" NAMES "}, {" P0 ", " P1 ", " P2 \
                   ", " P3 "}, " P4 ", 1, 1, 1, 1;"                                                                    \
                   : C(0)                                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }                                                                                                                  \
  };
#define PRODUCTS_64(T, type) PRODUCTS(T, type, 8, "64", C32, NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37")
#define PRODUCTS_128(T, type) PRODUCTS(T, type, 16, "128", C64, NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69")
PRODUCTS_64(__half, "f16")
PRODUCTS_64(__nv_bfloat16, "bf16")
PRODUCTS_128(__half, "f16")
PRODUCTS_128(__nv_bfloat16, "bf16")
