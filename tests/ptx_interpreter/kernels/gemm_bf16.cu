// C[M, N] (f32) = A[M, K] (bf16, row-major) times B[N, K] (bf16, row-major) transposed.
//
// One block of 128 threads (2 x 2 warps of 32 x 32) makes a 64 x 64 tile of C; K goes by in tiles
// of 32 through two shared-memory buffers that cp.async fills one tile ahead of the mma.sync that
// reads them. M and N are multiples of 64, K of 32. A row of shared memory has 32 + 8 elements (80
// bytes), which puts the eight 16-byte rows of an ldmatrix into distinct banks.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int kTile = 64;
constexpr int kTileK = 32;
constexpr int kRow = kTileK + 8;

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void copy_16_bytes(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

__device__ void copy_tile(__nv_bfloat16 (*shared)[kRow], const __nv_bfloat16* global, int K) {
  for (int chunk = threadIdx.x; chunk < kTile * kTileK / 8; chunk += blockDim.x) {
    const int row = chunk / (kTileK / 8);
    const int column = chunk % (kTileK / 8) * 8;
    copy_16_bytes(&shared[row][column], global + static_cast<int64_t>(row) * K + column);
  }
}

__device__ void commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
    gemm_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int N, int K) {
  __shared__ alignas(16) __nv_bfloat16 tile_a[2][kTile][kRow];
  __shared__ alignas(16) __nv_bfloat16 tile_b[2][kTile][kRow];
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 64 * 32;
  const int warp_column = threadIdx.x / 32 % 2 * 32;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  a += first_row * K;
  b += first_column * K;

  float sum[2][4][4] = {};
  copy_tile(tile_a[0], a, K);
  copy_tile(tile_b[0], b, K);
  commit();
  const int tiles = K / kTileK;
  for (int tile = 0; tile < tiles; ++tile) {
    const int buffer = tile % 2;
    if (tile + 1 < tiles) {
      copy_tile(tile_a[1 - buffer], a + (tile + 1) * kTileK, K);
      copy_tile(tile_b[1 - buffer], b + (tile + 1) * kTileK, K);
      commit();
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    for (int k = 0; k < kTileK; k += 16) {
      uint32_t rows[2][4], columns[2][4];
      for (int i = 0; i < 2; ++i) {
        load_matrices(rows[i], &tile_a[buffer][warp_row + i * 16 + lane % 16][k + lane / 16 * 8]);
        load_matrices(
            columns[i],
            &tile_b[buffer][warp_column + i * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          multiply_add(sum[i][j], rows[i], columns[j / 2][j % 2 * 2],
                       columns[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    __syncthreads();
  }

  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_row + warp_row + i * 16 + lane / 4;
      const int64_t column = first_column + warp_column + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(&c[row * N + column]) = make_float2(sum[i][j][0], sum[i][j][1]);
      *reinterpret_cast<float2*>(&c[(row + 8) * N + column]) =
          make_float2(sum[i][j][2], sum[i][j][3]);
    }
  }
}
