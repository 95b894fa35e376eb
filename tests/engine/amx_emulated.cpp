// The AMX kernels on a processor without AMX: those of bytes against the AVX-512 VNNI ones, bit for bit, those of
// bfloat16 against float64, and rows together against each row alone.
//
// Such a processor refuses every tile instruction with a signal. The handler here does what the instruction would have
// done and goes on behind it: what is tested is the machine code that processors with AMX run, which do so themselves.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "herd/engine_kernels.h"

namespace {

// What LDTILECFG reads, and the eight tiles.
struct Tiles {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
} shapes;
static_assert(sizeof(Tiles) == 64);
std::uint8_t data[8][16][64];
long emulated = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "tile instruction %ld: %s\n", emulated, what);
  std::_Exit(2);
}
void expect(bool right, const char* what) {
  if (!right) fail(what);
}

void configure(const void* p) {
  std::memcpy(&shapes, p, sizeof shapes);
  std::memset(data, 0, sizeof data);
  expect(shapes.palette == 1 && !shapes.start_row, "palette");
  for (const std::uint8_t byte : shapes.reserved) expect(!byte, "reserved bytes of the configuration");
  for (int t = 0; t < 16; ++t) {
    const int rows = shapes.rows[t], bytes = shapes.row_bytes[t];
    expect(t < 8 ? rows <= 16 && bytes <= 64 && !rows == !bytes : !rows && !bytes, "shape in the configuration");
  }
}

struct ProductShape {
  int rows, columns, depth;  // depth: groups of four bytes
};
ProductShape product_shape(int to, int inputs, int weights) {
  const ProductShape shape{shapes.rows[to], shapes.row_bytes[to] / 4, shapes.row_bytes[inputs] / 4};
  expect(to != inputs && to != weights && inputs != weights, "one tile twice");
  expect(shapes.rows[inputs] == shape.rows && shapes.rows[weights] == shape.depth &&
             shapes.row_bytes[weights] == 4 * shape.columns && shapes.row_bytes[inputs] == 4 * shape.depth,
         "shapes of a product");
  return shape;
}

// tile[to] += inputs (bfloat16) · weights (bfloat16, two of a column side by side): the sums of the even and of the odd
// ones, then both.
void multiply_bf16(int to, int inputs, int weights) {
  const auto [rows, columns, depth] = product_shape(to, inputs, weights);
  const auto number = [](const std::uint8_t* p) {
    const std::uint32_t word = static_cast<std::uint32_t>(p[0] | p[1] << 8) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  };
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float sum, parts[2] = {};
      std::memcpy(&sum, &data[to][m][4 * n], 4);
      for (int k = 0; k < depth; ++k)
        for (int i = 0; i < 2; ++i)
          parts[i] =
              std::fma(number(&data[inputs][m][4 * k + 2 * i]), number(&data[weights][k][4 * n + 2 * i]), parts[i]);
      sum += parts[0] + parts[1];
      std::memcpy(&data[to][m][4 * n], &sum, 4);
    }
}

// tile[to] += inputs (signed bytes) · weights (signed bytes, four of a column side by side).
void multiply(int to, int inputs, int weights) {
  const auto [rows, columns, depth] = product_shape(to, inputs, weights);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      std::int32_t sum;
      std::memcpy(&sum, &data[to][m][4 * n], 4);
      for (int k = 0; k < depth; ++k)
        for (int i = 0; i < 4; ++i)
          sum += static_cast<std::int8_t>(data[inputs][m][4 * k + i]) *
                 static_cast<std::int8_t>(data[weights][k][4 * n + i]);
      std::memcpy(&data[to][m][4 * n], &sum, 4);
    }
}

// The instructions that the kernels use: C4 [R X B map] [W vvvv L prefix] opcode ModRM [SIB] [displacement].
void on_illegal_instruction(int, siginfo_t*, void* context) {
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
  const int opcode = code[3], prefix = code[2] & 3, modrm = code[4], mode = modrm >> 6, reg = modrm >> 3 & 7;
  const bool tile = code[0] == 0xc4 && (code[1] & 0x1f) == 2 && !(code[2] & 0x84);
  if (!tile || (opcode != 0x49 && opcode != 0x4b && opcode != 0x5c && opcode != 0x5e)) {  // a real mistake
    signal(SIGILL, SIG_DFL);
    return;
  }
  ++emulated;
  enum { none, p66, pf3, pf2 };
  int length = 5;
  if (mode == 3) {
    if (opcode == 0x49 && prefix == none && modrm == 0xc0) {
      std::memset(&shapes, 0, sizeof shapes);
      std::memset(data, 0, sizeof data);
    } else if (opcode == 0x49 && prefix == pf2) {
      expect(shapes.rows[reg] && !(modrm & 7), "tile without shape");
      std::memset(data[reg], 0, sizeof data[reg]);
    } else if (opcode == 0x5e && prefix == pf2) {
      multiply(reg, modrm & 7, ~code[2] >> 3 & 15);
    } else if (opcode == 0x5c && prefix == pf3) {
      multiply_bf16(reg, modrm & 7, ~code[2] >> 3 & 15);
    } else {
      fail("not emulated");
    }
    registers[REG_RIP] += length;
    return;
  }
  static constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                         REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  int base = modrm & 7, index = 4;
  long long stride = 0;
  if (base == 4) {
    const int sib = code[length++];
    base = sib & 7, index = (sib >> 3 & 7) | (code[1] & 0x40 ? 0 : 8);
    if (index != 4) stride = registers[kRegisters[index]] << (sib >> 6);
  }
  const bool relative = (modrm & 7) == 5 && mode == 0, absolute = base == 5 && mode == 0 && !relative;
  long long address = relative || absolute ? 0 : registers[kRegisters[base | (code[1] & 0x20 ? 0 : 8)]];
  std::int32_t wide = 0;
  if (mode == 1) {
    address += static_cast<std::int8_t>(code[length++]);
  } else if (mode == 2 || relative || absolute) {
    std::memcpy(&wide, code + length, 4);
    address += wide, length += 4;
  }
  if (relative) address += registers[REG_RIP] + length;
  if (opcode == 0x49) {
    expect(prefix == none && reg == 0, "not emulated");
    configure(reinterpret_cast<const void*>(address + stride));
  } else {
    expect((modrm & 7) == 4 && (prefix == pf2 || prefix == pf3), "not emulated");
    expect(shapes.rows[reg], "tile without shape");
    if (prefix == pf2) std::memset(data[reg], 0, sizeof data[reg]);
    for (int r = 0; r < shapes.rows[reg]; ++r) {
      auto* row = reinterpret_cast<std::uint8_t*>(address + r * stride);
      prefix == pf2 ? std::memcpy(data[reg][r], row, shapes.row_bytes[reg])
                    : std::memcpy(row, data[reg][r], shapes.row_bytes[reg]);
    }
  }
  registers[REG_RIP] += length;
}

// Memory that ends where no access is allowed.
class Guarded {
 public:
  explicit Guarded(std::int64_t bytes) : size_((static_cast<std::size_t>(bytes) + 4095) / 4096 * 4096) {
    start_ = static_cast<std::uint8_t*>(
        mmap(nullptr, size_ + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED || mprotect(start_ + size_, 4096, PROT_NONE)) std::_Exit(3);
    data = start_ + size_ - bytes;
  }
  ~Guarded() { munmap(start_, size_ + 4096); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  std::uint8_t* data;

 private:
  std::size_t size_;
  std::uint8_t* start_;
};

using namespace herd;
std::mt19937 random_bits(7);
int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

// Bytes at random, among them every code and scales that are no numbers; or the largest and smallest codes and small
// scales, which lie behind the codes.
void fill(const Matrix& w, std::uint8_t* out, bool extreme) {
  static constexpr std::uint8_t kExtremes[] = {0x00, 0xff, 0x0f, 0xf0, 0x80, 0x7f};
  const TileSize size = tile_size(w.format);
  const int codes = size.tile / 5 * 4 / 64 * 64;
  for (std::int64_t s = 0; s < w.strips(); ++s)
    for (std::int64_t b = 0; b < w.tiles(); ++b) {
      if (b % 8 == 0)
        for (int i = 0; i < size.header; ++i) *out++ = static_cast<std::uint8_t>(below(extreme ? 0x3f : 256));
      for (int i = 0; i < size.tile; ++i)
        *out++ = extreme && i < codes ? kExtremes[below(6)] : static_cast<std::uint8_t>(below(extreme ? 0x3f : 256));
    }
}

void fill(const Panel& x, bool extreme) {
  static constexpr std::int8_t kExtremes[] = {-127, 127, 0, -128};
  for (int row = 0; row < x.rows; ++row)
    for (std::int64_t b = 0; b < x.blocks; ++b) {
      auto& block = *reinterpret_cast<Int8Block*>(x.block(row, b));
      std::int32_t halves[2] = {};
      for (int i = 0; i < kTile; ++i) {
        block.codes[i] = extreme ? kExtremes[below(4)] : static_cast<std::int8_t>(below(256) - 128);
        halves[i / 16] += block.codes[i];
      }
      block.scale = static_cast<float>(below(1 << 24)) * (below(2) ? 1e-9f : 1e-3f);
      if (!extreme && row % 11 == 3) block.scale = b % 2 ? 1.0f / 0.0f : 0.0f / 0.0f;
      block.minus[0] = -halves[0] - halves[1], block.minus[1] = -halves[0], block.minus[2] = -halves[1];
      for (int i = 0; i < 3; ++i) block.sum[i] = -block.scale * static_cast<float>(block.minus[i]);
    }
}

long numbers = 0, differences = 0;  // of outputs

void compare(Format format, int rows, int blocks, bool add, bool extreme) {
  const Matrix shape{format, 21, 32 * blocks - 5, nullptr};
  const Guarded weights(shape.bytes()), inputs(rows * blocks * block_bytes(Inputs::int8));
  const Matrix w{format, shape.rows, shape.columns, weights.data};
  const Panel x{Inputs::int8, rows, blocks, inputs.data};
  fill(w, weights.data, extreme), fill(x, extreme);
  constexpr int kStride = 23;
  std::vector<float> start(static_cast<std::size_t>(rows * kStride)), results[2];
  for (float& v : start) v = static_cast<float>(below(2000) - 1000);
  const EngineKernels* kernels[] = {&kEngineAvx512Vnni, &kEngineAmx};
  for (int i = 0; i < 2; ++i) {
    results[i] = start;
    kernels[i]->multiply(w, rows % 2, x, results[i].data(), kStride, add);
    expect(!shapes.palette, "tiles are not released");
  }
  for (std::size_t i = 0; i < start.size(); ++i) {
    const float a = results[0][i], b = results[1][i];
    if (a != a && b != b) continue;
    ++numbers;
    if (std::memcmp(&a, &b, 4) == 0) continue;
    if (++differences < 10)
      std::printf("format %d, %d rows, %d blocks, row %zu column %zu: %.9g and %.9g\n", static_cast<int>(format), rows,
                  blocks, i / kStride, i % kStride, a, b);
  }
}

// Every row alone and all together must have the same bits, and be what float64 gives.
void compare_bf16(int rows, int blocks) {
  const Matrix shape{Format::bf16, 32, 32 * blocks, nullptr};
  const std::int64_t row_bytes = blocks * block_bytes(Inputs::bf16);
  const Guarded weights(shape.bytes()), inputs(rows * row_bytes), single(row_bytes);
  const Matrix w{Format::bf16, shape.rows, shape.columns, weights.data};
  const Panel x{Inputs::bf16, rows, blocks, inputs.data}, one{Inputs::bf16, 1, blocks, single.data};
  // Of 1 to 2 in eight bits, with either sign: [strip][block][pair][row][2] and [block][row][32].
  const auto draw = [](std::uint8_t* p) {
    p[0] = static_cast<std::uint8_t>(128 | below(128)), p[1] = below(2) ? 0x3f : 0xbf;
  };
  const auto value = [](const std::uint8_t* p) { return (p[1] == 0x3f ? 1.0 : -1.0) * (p[0] & 127 | 128) / 128.0; };
  for (std::int64_t i = 0; i < shape.bytes(); i += 2) draw(weights.data + i);
  for (std::int64_t i = 0; i < rows * row_bytes; i += 2) draw(inputs.data + i);
  std::vector<float> together(static_cast<std::size_t>(rows * kStrip)), alone(kStrip);
  const std::int64_t strip = rows % 2;
  kEngineAmx.multiply(w, strip, x, together.data(), kStrip, false);
  expect(!shapes.palette, "tiles are not released");
  for (int row = 0; row < rows; ++row) {
    for (std::int64_t b = 0; b < blocks; ++b) std::memcpy(one.block(0, b), x.block(row, b), 64);
    kEngineAmx.multiply(w, strip, one, alone.data(), kStrip, false);
    for (int n = 0; n < kStrip; ++n) {
      double exact = 0;
      for (int b = 0; b < blocks; ++b)
        for (int k = 0; k < kTile; ++k)
          exact +=
              value(x.block(row, b) + 2 * k) * value(w.strip(strip) + 1024 * b + 64 * (k / 2) + 4 * n + 2 * (k % 2));
      const float found = together[static_cast<std::size_t>(row * kStrip + n)];
      ++numbers;
      if (std::memcmp(&found, &alone[static_cast<std::size_t>(n)], 4) == 0 &&
          std::fabs(found - exact) < 1e-5 * 32 * blocks)
        continue;
      if (++differences < 10)
        std::printf("bf16, %d rows, %d blocks, row %d column %d: %.9g, alone %.9g, exactly %.9g\n", rows, blocks, row,
                    n, found, alone[static_cast<std::size_t>(n)], exact);
    }
  }
}

}  // namespace

int main() {
  syscall(SYS_arch_prctl, 0x1023, 18);  // a processor with tiles may use them: nothing is emulated then
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  for (int f = 0; f < kFormats; ++f) {
    const auto format = static_cast<Format>(f);
    if (kEngineAmx.inputs_of(format) != Inputs::int8) continue;
    for (int rows = 1; rows <= 40; ++rows)
      for (const int blocks : {1, 2, 9}) compare(format, rows, blocks, rows / 2 % 2, (rows + blocks) % 3 == 0);
    for (const int rows : {16, 24, 65, 88, 256, 264, 300})  // up to 256 share unpacked weights
      for (const int blocks : {8, 17}) compare(format, rows, blocks, rows > 65, blocks == 8);
  }
  for (int rows = 1; rows <= 80; rows += rows < 41 ? 1 : 13)
    for (const int blocks : {1, 2, 9}) compare_bf16(rows, blocks);
  std::printf("%ld outputs, %ld tile instructions emulated, %ld differences\n", numbers, emulated, differences);
  return differences ? 1 : 0;
}
