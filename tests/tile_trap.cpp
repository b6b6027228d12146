// Runs the very machine code of the kernel on AMX tiles on a CPU that has none: each of its instructions is unknown to
// it, raises a signal, and is done here by what tiles.h has for such CPUs. Built without AMX and linked to
// attention_bf16.cpp, built with it. Standard input: b, n, m, heads, d, threads as int64, then q, k and v; output: out.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <vector>

#include "../ldm/native/tiles.h"

extern "C" void attention_bf16(const Half*, const Half*, const Half*, Half*, int64_t, int64_t, int64_t, int64_t,
                               int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int);

namespace {

// By the numbers of ModRM and SIB.
constexpr int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

void unknown(const char* why) {
  fprintf(stderr, "tile_trap: %s\n", why);
  _exit(3);
}

void handle(int, siginfo_t*, void* context) {
  static thread_local bool configured = false;
  greg_t* r = ((ucontext_t*)context)->uc_mcontext.gregs;
  const uint8_t* code = (const uint8_t*)r[REG_RIP];
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84)) unknown("not VEX.128.0F38.W0");
  const int prefix = code[2] & 3, opcode = code[3], reg = code[4] >> 3 & 7, rm = code[4] & 7, mod = code[4] >> 6;
  enum { NONE, P66, PF3, PF2 };
  const uint8_t* end = code + 5;
  char* address = nullptr;
  int64_t stride = 0;
  if (mod != 3) {
    int base = rm, index = 4, shift = 0;
    if (rm == 4) {
      index = (*end >> 3 & 7) | (~code[1] & 0x40) >> 3;
      base = *end & 7;
      shift = *end++ >> 6;
    }
    if (mod == 0 && (base & 7) == 5) unknown("an address without base");
    address = (char*)r[REGISTERS[base | (~code[1] & 0x20) >> 2]];
    if (mod == 1) address += (int8_t)*end++;
    if (mod == 2) address += *(const int32_t*)end, end += 4;
    if (index != 4) stride = r[REGISTERS[index]] << shift;
  }
  if (opcode == 0x49 && prefix == NONE) {
    if (mod != 3) {  // ldtilecfg
      for (int i = 0; i < 64; i++) {
        const int expected = i == 0 ? 1 : i < 16 ? 0 : i < 32 ? (i % 2 ? 0 : 64) : i < 48 ? 0 : i < 56 ? 16 : 0;
        if ((uint8_t)address[i] != expected) unknown("not palette 1 of eight whole tiles");
      }
      memset(tile_bits, 0, sizeof tile_bits);
    } else if (!configured) {
      unknown("released twice");
    }
    configured = mod != 3;
  } else if (!configured) {
    unknown("no configuration");
  } else if (opcode == 0x49 && prefix == PF2 && mod == 3) {
    clear_tile(reg);
  } else if (opcode == 0x4b && prefix == PF2 && mod != 3) {
    read_tile(reg, address, stride);
  } else if (opcode == 0x4b && prefix == PF3 && mod != 3) {
    write_tile(reg, address, stride);
  } else if (opcode == 0x5c && prefix == PF3 && mod == 3) {
    multiply_tiles(reg, rm, ~code[2] >> 3 & 7);
  } else {
    unknown("no instruction of the kernel");
  }
  r[REG_RIP] = (greg_t)end;
}

std::vector<Half> input(size_t count) {
  std::vector<Half> x(count);
  if (fread(x.data(), 2, count, stdin) != count) unknown("standard input is too short");
  return x;
}

}  // namespace

int main() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  int64_t s[6];
  if (fread(s, 8, 6, stdin) != 6) unknown("standard input is too short");
  const auto [batch, n, m, heads, d, threads] = s;
  const int64_t width = heads * d;
  const std::vector<Half> q = input(batch * n * width), k = input(batch * m * width), v = input(batch * m * width);
  std::vector<Half> out(q.size());
  attention_bf16(q.data(), k.data(), v.data(), out.data(), batch, n, m, heads, d, n * width, width, m * width, width,
                 m * width, width, threads);
  fwrite(out.data(), 2, out.size(), stdout);
}
