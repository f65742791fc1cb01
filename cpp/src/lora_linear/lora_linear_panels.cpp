// How the LoRA linear is cut into tasks over one variant's panel kernels. Knows no instruction set.
//
// A task owns a block of rows and one panel of 64 lanes: it decodes the panel into its thread's
// cache and multiplies all its rows by it. Reductions longer than a panel go chunk by chunk through
// fp32 partial sums. A product too small to give many threads a task each is cut along its
// reduction as well, into parts that are summed in order. How sums are cut depends on the shape
// alone, so results do not depend on the number of threads.
#include <algorithm>
#include <cstring>
#include <memory>

#include "lora_linear_impl.h"
#include "support/parallel.h"
#include "support/scalar.h"

namespace halfbyte {
namespace {

constexpr int64_t kTileRows = 6;
constexpr int64_t kMaxBlockRows = 516;  // whole tiles; what a task reads of x stays in L3
constexpr int64_t kMinBlockRows = 60;
constexpr int64_t kPackRows = 11;    // packing a panel costs as much as multiplying so many rows
constexpr int64_t kSkinnyRows = 48;  // rows a task of the skinny products T and U
constexpr int64_t kManyTasks = 64;   // products of fewer tasks are cut along the reduction
constexpr int64_t kMinPartUnits = 256;

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Rows a task: of all numbers of blocks the one whose last thread is done first, when every task
// costs its rows and one packing of its panel.
int64_t block_rows(int64_t rows, int64_t panels, int threads) {
  int64_t best = 0, best_cost = 0;
  const int64_t fewest = ceil_div(rows, kMaxBlockRows);
  for (int64_t blocks = fewest; blocks <= std::max(fewest, rows / kMinBlockRows); ++blocks) {
    const int64_t block = ceil_div(ceil_div(rows, blocks), kTileRows) * kTileRows;
    const int64_t rounds = ceil_div(panels * ceil_div(rows, block), threads);
    const int64_t cost = rounds * (block + kPackRows);
    if (best != 0 && cost >= best_cost) continue;
    best = block;
    best_cost = cost;
  }
  return best;
}

struct Driver {
  const PanelKernels& kernels;
  int threads;

  int64_t per_unit() const { return kernels.compute == DType::kBFloat16 ? 2 : 1; }
  int64_t units(int64_t elements) const { return ceil_div(elements, per_unit()); }
  // How long the chunks of a reduction are. One over nothing has a single empty chunk, which gives
  // zeros.
  int64_t chunk_of(int64_t depth) const {
    return std::clamp<int64_t>(depth, 1, kMaxPanelUnits * per_unit());
  }
  size_t panel_bytes(int64_t elements) const {
    return static_cast<size_t>(units(elements)) * kPanelLanes * 4;
  }
  DType weight_precision(DType activation) const {
    return activation == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
  }
};

PanelSource matrix_source(const Matrix& matrix, float scale = 1) {
  return {nullptr, DType::kFloat32, matrix, scale, {0, 0, 1}};
}

PanelSource weight_source(const Nf4Bits& bits, int64_t rows, int64_t cols, DType precision) {
  return {&bits, precision, {nullptr, DType::kFloat32, rows, cols, cols}, 1, {0, 0, 1}};
}

// A matrix in the compute type with rows of whole units: the caller's own memory when it already is
// that, a converted copy otherwise.
struct Staged {
  Matrix matrix{};
  std::unique_ptr<AlignedBuffer> copy;

  const char* row(int64_t index) const {
    return static_cast<const char*>(matrix.data) + index * row_bytes();
  }
  int64_t row_bytes() const { return matrix.stride * element_bytes(matrix.dtype); }
};

Staged stage(const Driver& driver, const Matrix& source) {
  if (source.dtype == driver.kernels.compute && source.cols % driver.per_unit() == 0)
    return {source, nullptr};
  Staged staged;
  const int64_t stride = driver.units(source.cols) * driver.per_unit();
  staged.copy = std::make_unique<AlignedBuffer>(
      static_cast<size_t>(source.rows * stride * element_bytes(driver.kernels.compute)));
  staged.matrix = {staged.copy->as<void>(), driver.kernels.compute, source.rows, source.cols,
                   stride};
  const PanelSource rows = matrix_source(source);
  parallel_for(ceil_div(source.rows, 16), driver.threads, [&](int64_t task) {
    for (int64_t r = task * 16; r < std::min(source.rows, task * 16 + 16); ++r)
      driver.kernels.convert_row(rows, r, const_cast<char*>(staged.row(r)));
  });
  return staged;
}

// The transpose of a small matrix in the compute type, rows padded to whole units.
Staged stage_transposed(const Driver& driver, const Matrix& source) {
  Staged staged;
  const int64_t stride = driver.units(source.rows) * driver.per_unit();
  staged.copy = std::make_unique<AlignedBuffer>(
      static_cast<size_t>(source.cols * stride * element_bytes(driver.kernels.compute)));
  staged.matrix = {staged.copy->as<void>(), driver.kernels.compute, source.cols, source.rows,
                   stride};
  parallel_for(source.cols, driver.threads, [&](int64_t col) {
    const Matrix& to = staged.matrix;
    for (int64_t row = 0; row < stride; ++row) {
      const float value = row < source.rows
                              ? load_element(source.data, source.dtype, row * source.stride + col)
                              : 0.0f;
      store_element(to.data, to.dtype, col * stride + row, value);
    }
  });
  return staged;
}

enum class Lanes { kRows, kColumns };

// out[rows, lanes] = in * source: `source` is wide in lanes, so it is packed panel by panel inside
// the tasks, and each task takes a block of rows.
struct WideProduct {
  PanelSource source{};
  Lanes lanes_are = Lanes::kRows;
  int64_t lanes = 0;  // N forward, K backward
  int64_t depth = 0;  // K forward, N backward
  const Staged* in = nullptr;
  // The LoRA branch, summed first: in2 * source2, masked.
  const Staged* first_in = nullptr;
  PanelSource first_source{};
  Lanes first_lanes_are = Lanes::kRows;
  int64_t first_depth = 0;
  DropoutMask first_mask{0, 0, 1};
  Matrix bias{};
  Matrix out{};
};

void pack(const Driver& driver, const PanelSource& source, Lanes lanes_are, int64_t lane, int lanes,
          int64_t begin, int64_t count, void* panel) {
  if (lanes_are == Lanes::kRows) {
    driver.kernels.pack_rows(source, lane, lanes, begin, count, panel);
  } else {
    driver.kernels.pack_columns(source, begin, count, lane, lanes, panel);
  }
}

void load_bias(const Matrix& bias, int64_t lane, int lanes, float out[kPanelLanes]) {
  for (int i = 0; i < kPanelLanes; ++i)
    out[i] = i < lanes ? load_element(bias.data, bias.dtype, lane + i) : 0.0f;
}

// The packed codes of the panel at `lane`, to be fetched during a product of `rows` rows: all bytes
// of its rows evenly, or one line of each row.
Ahead codes_of_panel(const Driver& driver, const WideProduct& w, int64_t lane, int64_t rows) {
  constexpr int64_t kLine = 64, kLeastStep = 8;
  const Nf4Bits* weight = w.source.weight;
  if (weight == nullptr || w.depth == 0) return {};
  const int64_t row_bytes = w.source.matrix.cols / 2;
  const char* codes = reinterpret_cast<const char*>(weight->packed);
  if (w.lanes_are == Lanes::kColumns) return {codes + lane / 2, row_bytes, w.depth};
  const int64_t bytes = std::min<int64_t>(kPanelLanes, w.lanes - lane) * row_bytes;
  const int64_t units = ceil_div(rows, kTileRows) * driver.units(w.depth);
  const int64_t step = std::clamp(ceil_div(bytes, units), kLeastStep, kLine);
  return {codes + lane * row_bytes, step, ceil_div(bytes, step)};
}

// The product of rows [row, row + rows) by the panel at `lane`, all but its reduction.
PanelProduct product_of(const WideProduct& w, int64_t row, int64_t rows, int64_t lane) {
  PanelProduct p{};
  p.rows = rows;
  p.lanes = static_cast<int>(std::min<int64_t>(kPanelLanes, w.lanes - lane));
  p.stride = w.in->row_bytes();
  p.out_dtype = w.out.dtype;
  p.out_stride = w.out.stride;
  p.out = static_cast<char*>(w.out.data) + (row * w.out.stride + lane) * element_bytes(w.out.dtype);
  return p;
}

// Packs the LoRA branch's panel and puts it first.
void add_first(const Driver& driver, const WideProduct& w, int64_t row, int64_t lane,
               PanelProduct& p) {
  void* first = thread_scratch(ScratchSlot::kSecondPanel, driver.panel_bytes(w.first_depth));
  pack(driver, w.first_source, w.first_lanes_are, lane, p.lanes, 0, w.first_depth, first);
  p.first_panel = first;
  p.first_units = driver.units(w.first_depth);
  p.first_in = w.first_in->row(row);
  p.first_stride = w.first_in->row_bytes();
  p.first_mask = w.first_mask;
  p.mask_row = row;
  p.mask_column = lane;
}

// Packs the reduction's elements [begin, begin + count) of the panel at `lane` and multiplies.
void multiply_chunk(const Driver& driver, const WideProduct& w, int64_t row, int64_t lane,
                    int64_t begin, int64_t count, PanelProduct& p) {
  void* panel = thread_scratch(ScratchSlot::kPanel, driver.panel_bytes(count));
  pack(driver, w.source, w.lanes_are, lane, p.lanes, begin, count, panel);
  p.panel = panel;
  p.units = driver.units(count);
  p.in = w.in->row(row) + begin * element_bytes(driver.kernels.compute);
  driver.kernels.multiply(p);
}

// `next_lane`: the panel that this thread will most likely pack after this one.
void multiply_block(const Driver& driver, const WideProduct& w, int64_t row, int64_t rows,
                    int64_t lane, int64_t next_lane) {
  float bias[kPanelLanes];
  PanelProduct p = product_of(w, row, rows, lane);
  if (w.bias.data) {
    load_bias(w.bias, lane, p.lanes, bias);
    p.bias = bias;
  }
  if (w.first_in) add_first(driver, w, row, lane, p);
  const int64_t chunk = driver.chunk_of(w.depth);
  if (w.depth > chunk)
    p.partial = static_cast<float*>(thread_scratch(
        ScratchSlot::kTile, static_cast<size_t>(rows) * kPanelLanes * sizeof(float)));
  for (int64_t begin = 0; begin == 0 || begin < w.depth; begin += chunk) {
    const int64_t count = std::min(chunk, w.depth - begin);
    p.store_partial = begin + count < w.depth;
    if (!p.store_partial) p.ahead = codes_of_panel(driver, w, next_lane, rows);
    multiply_chunk(driver, w, row, lane, begin, count, p);
    p.load_partial = true;
    p.first_in = nullptr;
  }
}

// The elements of a part of the reduction when it is cut, or all of it.
int64_t part_elements(const Driver& driver, const WideProduct& w, int64_t panels) {
  const int64_t tasks = panels * ceil_div(w.out.rows, kMinBlockRows);
  const int64_t parts =
      std::min(ceil_div(kManyTasks, tasks), driver.units(w.depth) / kMinPartUnits);
  if (tasks >= kManyTasks || parts <= 1) return w.depth;
  return std::min(ceil_div(driver.units(w.depth), parts), kMaxPanelUnits) * driver.per_unit();
}

// Every part of every panel by itself, then their sums in order.
void run_wide_in_parts(const Driver& driver, const WideProduct& w, int64_t panels, int64_t part) {
  const int64_t rows = w.out.rows, parts = ceil_div(w.depth, part);
  const int64_t tile = rows * kPanelLanes;  // floats of a part's sums
  AlignedBuffer sums(static_cast<size_t>(panels * parts * tile) * sizeof(float));
  const auto sums_of = [&](int64_t panel, int64_t i) {
    return sums.as<float>() + (panel * parts + i) * tile;
  };
  parallel_for(panels * parts, driver.threads, [&](int64_t task) {
    const int64_t panel = task / parts, i = task % parts, lane = panel * kPanelLanes;
    PanelProduct p = product_of(w, 0, rows, lane);
    if (w.first_in && i == 0) add_first(driver, w, 0, lane, p);
    p.partial = sums_of(panel, i);
    p.store_partial = true;
    multiply_chunk(driver, w, 0, lane, i * part, std::min(part, w.depth - i * part), p);
  });
  parallel_for(panels, driver.threads, [&](int64_t panel) {
    const int64_t lane = panel * kPanelLanes;
    float* total = sums_of(panel, 0);
    for (int64_t i = 1; i < parts; ++i) {
      const float* more = sums_of(panel, i);
      for (int64_t j = 0; j < tile; ++j) total[j] += more[j];
    }
    float bias[kPanelLanes];
    PanelProduct p = product_of(w, 0, rows, lane);  // no units: stores the sums
    if (w.bias.data) {
      load_bias(w.bias, lane, p.lanes, bias);
      p.bias = bias;
    }
    p.partial = total;
    p.load_partial = true;
    driver.kernels.multiply(p);
  });
}

void run_wide(const Driver& driver, const WideProduct& w) {
  const int64_t rows = w.out.rows;
  if (rows == 0) return;
  const int64_t panels = ceil_div(w.lanes, kPanelLanes);
  const int64_t part = part_elements(driver, w, panels);
  if (part < w.depth) return run_wide_in_parts(driver, w, panels, part);
  const int64_t per_task = block_rows(rows, panels, driver.threads);
  const int64_t blocks = ceil_div(rows, per_task);
  parallel_for(panels * blocks, driver.threads, [&](int64_t task) {
    const int64_t row = task / panels * per_task;
    multiply_block(driver, w, row, std::min(per_task, rows - row), task % panels * kPanelLanes,
                   (task + driver.threads) % panels * kPanelLanes);
  });
}

// out[rows, R] = drop(in) * source: `source` is narrow, so all its panels are packed once and
// shared, and tasks take few rows each.
void run_skinny(const Driver& driver, const Staged& in, const DropoutMask& mask,
                const PanelSource& source, Lanes lanes_are, int64_t lanes, const Matrix& out) {
  const int64_t depth = in.matrix.cols;
  const int64_t panels = ceil_div(lanes, kPanelLanes);
  const int64_t chunk = driver.chunk_of(depth);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(depth, chunk));
  const size_t panel_bytes = driver.panel_bytes(chunk);
  AlignedBuffer packed(panel_bytes * static_cast<size_t>(panels * chunks));
  const auto panel_at = [&](int64_t panel, int64_t c) {
    return packed.as<char>() + panel_bytes * static_cast<size_t>(panel * chunks + c);
  };
  const auto lanes_in = [&](int64_t panel) {
    return static_cast<int>(std::min<int64_t>(kPanelLanes, lanes - panel * kPanelLanes));
  };
  parallel_for(panels * chunks, driver.threads, [&](int64_t task) {
    const int64_t panel = task / chunks, c = task % chunks;
    pack(driver, source, lanes_are, panel * kPanelLanes, lanes_in(panel), c * chunk,
         std::min(chunk, depth - c * chunk), panel_at(panel, c));
  });

  const int64_t compute_bytes = element_bytes(driver.kernels.compute);
  parallel_for(ceil_div(out.rows, kSkinnyRows), driver.threads, [&](int64_t task) {
    const int64_t row = task * kSkinnyRows;
    PanelProduct p{};
    p.rows = std::min(kSkinnyRows, out.rows - row);
    p.stride = in.row_bytes();
    const char* rows = in.row(row);
    if (mask.threshold) {
      char* copy = static_cast<char*>(
          thread_scratch(ScratchSlot::kStage, static_cast<size_t>(p.rows * p.stride)));
      PanelSource masked = matrix_source(in.matrix);
      masked.dropout = mask;
      for (int64_t r = 0; r < p.rows; ++r)
        driver.kernels.convert_row(masked, row + r, copy + r * p.stride);
      rows = copy;
    }
    float* partial = static_cast<float*>(thread_scratch(
        ScratchSlot::kTile, static_cast<size_t>(kSkinnyRows) * kPanelLanes * sizeof(float)));
    for (int64_t panel = 0; panel < panels; ++panel) {
      p.lanes = lanes_in(panel);
      p.partial = partial;
      p.load_partial = false;
      p.out_dtype = out.dtype;
      p.out_stride = out.stride;
      p.out = static_cast<char*>(out.data) +
              (row * out.stride + panel * kPanelLanes) * element_bytes(out.dtype);
      for (int64_t c = 0; c < chunks; ++c) {
        p.panel = panel_at(panel, c);
        p.units = driver.units(std::min(chunk, depth - c * chunk));
        p.in = rows + c * chunk * compute_bytes;
        p.store_partial = c + 1 < chunks;
        driver.kernels.multiply(p);
        p.load_partial = true;
      }
    }
  });
}

// d[r, lane] = sum_m left[m, r] drop(right)[m, lane], for each panel of lanes: dA directly, dB by
// way of a transposed store with the scale. `bias` receives the column sums of `right`.
struct OuterProduct {
  Matrix left{};   // [M, R]
  Matrix right{};  // [M, lanes]
  DropoutMask mask{0, 0, 1};
  float scale = 1;
  bool transpose_out = false;
  Matrix out{};  // data null: only the column sums
  Matrix column_sums{};
};

void store_outer(const OuterProduct& o, const float* tile, int64_t lane, int lanes) {
  for (int64_t r = 0; r < o.left.cols; ++r)
    for (int i = 0; i < lanes; ++i) {
      const int64_t index =
          o.transpose_out ? (lane + i) * o.out.stride + r : r * o.out.stride + lane + i;
      store_element(o.out.data, o.out.dtype, index, o.scale * tile[r * kPanelLanes + i]);
    }
}

void sum_columns(const OuterProduct& o, int64_t lane, int lanes) {
  float sums[kPanelLanes] = {};
  for (int64_t m = 0; m < o.right.rows; ++m)
    for (int i = 0; i < lanes; ++i)
      sums[i] += load_element(o.right.data, o.right.dtype, m * o.right.stride + lane + i);
  for (int i = 0; i < lanes; ++i)
    store_element(o.column_sums.data, o.column_sums.dtype, lane + i, sums[i]);
}

void run_outer(const Driver& driver, const OuterProduct& o) {
  const int64_t rows = o.right.rows, ranks = o.out.data ? o.left.cols : 0;
  const Staged left = ranks ? stage_transposed(driver, o.left) : Staged{};
  PanelSource source = matrix_source(o.right);
  source.dropout = o.mask;
  const int64_t chunk = driver.chunk_of(rows);
  parallel_for(ceil_div(o.right.cols, kPanelLanes), driver.threads, [&](int64_t task) {
    const int64_t lane = task * kPanelLanes;
    const int lanes = static_cast<int>(std::min<int64_t>(kPanelLanes, o.right.cols - lane));
    if (o.column_sums.data) sum_columns(o, lane, lanes);
    if (ranks == 0) return;
    PanelProduct p{};
    p.rows = ranks;
    p.lanes = lanes;
    p.stride = left.row_bytes();
    p.partial = static_cast<float*>(thread_scratch(
        ScratchSlot::kTile, static_cast<size_t>(ranks) * kPanelLanes * sizeof(float)));
    p.store_partial = true;
    void* panel = thread_scratch(ScratchSlot::kPanel, driver.panel_bytes(chunk));
    p.panel = panel;
    for (int64_t begin = 0; begin == 0 || begin < rows; begin += chunk) {
      const int64_t count = std::min(chunk, rows - begin);
      driver.kernels.pack_columns(source, begin, count, lane, lanes, panel);
      p.units = driver.units(count);
      p.in = left.row(0) + begin * element_bytes(driver.kernels.compute);
      driver.kernels.multiply(p);
      p.load_partial = true;
    }
    store_outer(o, p.partial, lane, lanes);
  });
}

}  // namespace

void forward_with_panels(const PanelKernels& kernels, const ForwardArgs& args) {
  if (few_rows_fit(kernels, args)) return forward_with_few_rows(kernels, args);
  const Driver driver{kernels, args.threads};
  const Staged x = stage(driver, args.x);
  Staged t;
  WideProduct w;
  if (args.lora_a.data) {
    run_skinny(driver, x, args.dropout, matrix_source(args.lora_a), Lanes::kRows, args.lora_a.rows,
               args.t);
    t = stage(driver, args.t);
    w.first_in = &t;
    w.first_source = matrix_source(args.lora_b, args.scaling);
    w.first_lanes_are = Lanes::kRows;
    w.first_depth = args.lora_a.rows;
  }
  w.source =
      weight_source(args.weight, args.y.cols, args.x.cols, driver.weight_precision(args.x.dtype));
  w.lanes_are = Lanes::kRows;
  w.lanes = args.y.cols;
  w.depth = args.x.cols;
  w.in = &x;
  w.bias = args.bias;
  w.out = args.y;
  run_wide(driver, w);
}

void backward_with_panels(const PanelKernels& kernels, const BackwardArgs& args) {
  const Driver driver{kernels, args.threads};
  const int64_t M = args.dy.rows, N = args.dy.cols, K = args.in_features;
  const int64_t R = args.lora_a.data ? args.lora_a.rows : 0;
  const Staged dy = stage(driver, args.dy);

  // U = s dY B, in the compute type with rows of whole units.
  Staged u;
  if (R && (args.dx.data || args.d_lora_a.data)) {
    const int64_t stride = driver.units(R) * driver.per_unit();
    const size_t bytes = static_cast<size_t>(M * stride * element_bytes(kernels.compute));
    u.copy = std::make_unique<AlignedBuffer>(bytes);
    std::memset(u.copy->as<void>(), 0, bytes);
    u.matrix = {u.copy->as<void>(), kernels.compute, M, R, stride};
    run_skinny(driver, dy, {0, 0, 1}, matrix_source(args.lora_b, args.scaling), Lanes::kColumns, R,
               u.matrix);
  }
  if (args.dx.data) {
    WideProduct w;
    if (R) {
      w.first_in = &u;
      w.first_source = matrix_source(args.lora_a);
      w.first_lanes_are = Lanes::kColumns;
      w.first_depth = R;
      w.first_mask = args.dropout;
    }
    w.source = weight_source(args.weight, N, K, driver.weight_precision(args.dy.dtype));
    w.lanes_are = Lanes::kColumns;
    w.lanes = K;
    w.depth = N;
    w.in = &dy;
    w.out = args.dx;
    run_wide(driver, w);
  }
  if (args.d_lora_a.data) {
    OuterProduct o;
    o.left = u.matrix;
    o.right = args.x;
    o.mask = args.dropout;
    o.out = args.d_lora_a;
    run_outer(driver, o);
  }
  if (args.d_lora_b.data || args.d_bias.data) {
    OuterProduct o;
    if (args.d_lora_b.data) o.left = args.t;
    o.right = args.dy;
    o.scale = args.scaling;
    o.transpose_out = true;
    o.out = args.d_lora_b;
    o.column_sums = args.d_bias;
    run_outer(driver, o);
  }
}

}  // namespace halfbyte
