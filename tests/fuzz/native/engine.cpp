#include "native/engine.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

extern "C" void __sanitizer_set_death_callback(void (*callback)());

// An input may allocate so much at once; bounds of readers are smaller.
extern "C" const char* __asan_default_options() { return "max_allocation_size_mb=64:detect_leaks=1:handle_abort=0"; }

namespace tersetorch::fuzz {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMap = 1 << 14;
constexpr std::size_t kMaxInput = 4096;
constexpr int kSeconds = 10;  // of one input

std::array<std::uint8_t, kMap> hits;      // how often each edge was taken
std::array<std::uint8_t, kMap> nearness;  // bits that agreed, at best, in each comparison
std::array<std::uint8_t, kMap> known, known_nearness;
struct Operands {
  std::uint64_t one, other;
  int bytes;
};
std::array<Operands, 256> compared;
std::size_t compared_count = 0;
std::uintptr_t place_before = 0;

// What runs, for handlers that may do little.
const Bytes* running = nullptr;
char crash_path[4096];

void WriteRunning() {
  if (running == nullptr) return;
  const int file = open(crash_path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  [[maybe_unused]] const auto written = write(file, running->data(), running->size());
  close(file);
  running = nullptr;
}

void OnSignal(int number) {
  WriteRunning();
  const char* what = number == SIGALRM ? "fuzz: an input takes too long\n" : "fuzz: aborted\n";
  [[maybe_unused]] const auto written = write(2, what, std::strlen(what));
  _exit(77);
}

std::size_t Mixed(std::uintptr_t number) { return (number * 0x9e3779b97f4a7c15u) >> 50; }

void Compared(std::uintptr_t place, std::uint64_t one, std::uint64_t other, int bytes) {
  if (one == other) return;
  const int agree = 8 * bytes - std::popcount((one ^ other) & (~std::uint64_t{0} >> (64 - 8 * bytes)));
  std::uint8_t& best = nearness[Mixed(place)];
  best = std::max(best, static_cast<std::uint8_t>(agree + 1));
  compared[compared_count++ % compared.size()] = {one, other, bytes};
}

// Runs of an edge that count as the same.
std::uint8_t Bucket(std::uint8_t count) {
  return static_cast<std::uint8_t>(1u << std::min(7, std::bit_width(count) - 1));
}

// Whether the last run did something that none did before; remembers it.
bool IsNew() {
  bool found = false;
  for (std::size_t i = 0; i < kMap; ++i) {
    if (hits[i] != 0) {
      const std::uint8_t bucket = Bucket(hits[i]);
      found |= (known[i] & bucket) == 0;
      known[i] |= bucket;
    }
    if (nearness[i] > known_nearness[i]) found = true, known_nearness[i] = nearness[i];
  }
  return found;
}

std::size_t EdgeCount() { return kMap - static_cast<std::size_t>(std::count(known.begin(), known.end(), 0)); }

void RunOne(const Bytes& input) {
  hits.fill(0);
  nearness.fill(0);
  compared_count = 0;
  place_before = 0;
  running = &input;
  const itimerval limit{{0, 0}, {kSeconds, 0}}, none{};
  setitimer(ITIMER_REAL, &limit, nullptr);
  try {
    const std::span<const std::uint8_t> all(input);
    if (!all.empty()) Targets()[all[0] % Targets().size()].run(all.subspan(1));
  } catch (const std::invalid_argument&) {
  }
  setitimer(ITIMER_REAL, &none, nullptr);
  running = nullptr;
}

using Random = std::mt19937_64;

void PutAt(Bytes& input, std::size_t at, std::uint64_t number, int bytes) {
  for (int i = 0; i < bytes && at + static_cast<std::size_t>(i) < input.size(); ++i) {
    input[at + static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(number >> 8 * i);
  }
}

// In the place of one operand of a comparison of the last run, the other, or a neighbour of it.
void PutOperand(Bytes& input, Random& random) {
  const std::size_t count = std::min(compared_count, compared.size());
  if (count == 0) return;
  Operands operands = compared[random() % count];
  if (random() % 2 == 0) std::swap(operands.one, operands.other);
  const std::uint64_t number = operands.other + random() % 3 - 1;
  for (int bytes = operands.bytes; bytes > 0; bytes /= 2) {
    for (std::size_t tries = 0, at = random() % input.size(); tries < input.size(); ++tries, ++at) {
      std::uint64_t found = 0;
      const std::size_t from = at % input.size();
      for (int i = 0; i < bytes && from + static_cast<std::size_t>(i) < input.size(); ++i) {
        found |= std::uint64_t{input[from + static_cast<std::size_t>(i)]} << 8 * i;
      }
      if (found == (operands.one & (~std::uint64_t{0} >> (64 - 8 * bytes)))) return PutAt(input, from, number, bytes);
    }
  }
}

// An input of the same target, made of one and of an other.
Bytes Changed(const Bytes& one, const Bytes& other, Random& random) {
  constexpr std::array<std::uint64_t, 10> kOdd = {0, 1, 2, 127, 128, 255, 256, 0x7fff, 0xffff, ~std::uint64_t{0}};
  Bytes input(one.begin() + 1, one.end());
  for (std::uint64_t changes = std::uint64_t{1} << random() % 4; changes > 0; --changes) {
    if (input.empty()) input.push_back(static_cast<std::uint8_t>(random()));
    const std::size_t at = random() % input.size(), length = 1 + random() % (random() % 4 == 0 ? 32 : 4);
    const auto place = input.begin() + static_cast<std::ptrdiff_t>(at);
    const auto end = input.begin() + static_cast<std::ptrdiff_t>(std::min(input.size(), at + length));
    switch (random() % 9) {
      case 0:
        *place ^= static_cast<std::uint8_t>(1u << random() % 8);
        break;
      case 1:
        *place = static_cast<std::uint8_t>(random());
        break;
      case 2:
        *place = static_cast<std::uint8_t>(*place + random() % 9 - 4);
        break;
      case 3:
        PutAt(input, at, kOdd[random() % kOdd.size()], 1 << random() % 4);
        break;
      case 4:
        input.erase(place, end);
        break;
      case 5: {
        const Bytes copy(place, end);
        input.insert(place, copy.begin(), copy.end());
        break;
      }
      case 6: {
        Bytes noise(length);
        for (std::uint8_t& byte : noise) byte = static_cast<std::uint8_t>(random());
        input.insert(place, noise.begin(), noise.end());
        break;
      }
      case 7: {  // a beginning of this, an end of the other
        const std::size_t from = 1 + random() % other.size();
        input.erase(place, input.end());
        input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
        break;
      }
      default:
        PutOperand(input, random);
    }
  }
  if (input.size() > kMaxInput) input.resize(kMaxInput);
  input.insert(input.begin(), one[0]);
  return input;
}

std::string NameOf(const Bytes& input) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const std::uint8_t byte : input) hash = (hash ^ byte) * 0x100000001b3u;
  char text[20];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

Bytes ReadFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("fuzz: cannot read " + path.string());
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

void WriteFile(const fs::path& path, const Bytes& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("fuzz: cannot write " + path.string());
}

// Inputs one after the other, each after its length in two bytes.
std::vector<Bytes> Unpacked(const Bytes& packed) {
  std::vector<Bytes> inputs;
  for (std::size_t at = 0; at + 2 <= packed.size();) {
    const std::size_t length = packed[at] | std::size_t{packed[at + 1]} << 8;
    if (length > packed.size() - at - 2) throw std::runtime_error("fuzz: the packed corpus is cut short");
    const auto begin = packed.begin() + static_cast<std::ptrdiff_t>(at + 2);
    inputs.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(length));
    at += 2 + length;
  }
  return inputs;
}

struct Asked {
  double seconds = 60;
  std::uint64_t runs = ~std::uint64_t{0}, seed = 0;
  fs::path corpus = "build/fuzz/native";
  std::string target, replay, seeds, pack;
};

Asked ReadArguments(int count, char** arguments) {
  Asked asked;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--seconds") {
      asked.seconds = std::stod(value);
    } else if (name == "--runs") {
      asked.runs = std::stoull(value);
    } else if (name == "--seed") {
      asked.seed = std::stoull(value);
    } else if (name == "--corpus") {
      asked.corpus = value;
    } else if (name == "--target") {
      asked.target = value;
    } else if (name == "--replay") {
      asked.replay = value;
    } else if (name == "--seeds") {
      asked.seeds = value;
    } else if (name == "--pack") {
      asked.pack = value;
    } else {
      throw std::invalid_argument("fuzz: unknown argument " + name);
    }
  }
  if (count % 2 == 0) throw std::invalid_argument("fuzz: every argument must have a value");
  return asked;
}

// The seeds of the targets, of the packed corpus, and what earlier runs left.
std::vector<Bytes> FirstInputs(const Asked& asked) {
  std::vector<Bytes> first;
  for (std::size_t number = 0; number < Targets().size(); ++number) {
    for (Bytes input : Targets()[number].seeds()) {
      input.insert(input.begin(), static_cast<std::uint8_t>(number));
      first.push_back(std::move(input));
    }
  }
  if (!asked.seeds.empty()) {
    for (Bytes& input : Unpacked(ReadFile(asked.seeds))) first.push_back(std::move(input));
  }
  std::set<fs::path> files;
  if (fs::exists(asked.corpus / "corpus")) {
    for (const auto& file : fs::directory_iterator(asked.corpus / "corpus")) files.insert(file.path());
  }
  for (const fs::path& file : files) first.push_back(ReadFile(file));
  if (!asked.target.empty()) {
    std::erase_if(first, [&](const Bytes& input) {
      return input.empty() || Targets()[input[0] % Targets().size()].name != asked.target;
    });
  }
  return first;
}

// The shortest inputs first, those that add something.
void Pack(std::vector<Bytes> inputs, const fs::path& path) {
  std::sort(inputs.begin(), inputs.end(),
            [](const Bytes& a, const Bytes& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
  known.fill(0);
  known_nearness.fill(255);  // edges alone: nearness is for finding them
  Bytes packed;
  for (const Bytes& input : inputs) {
    RunOne(input);
    for (std::uint8_t& count : hits) count = count != 0;
    if (!IsNew()) continue;
    packed.push_back(static_cast<std::uint8_t>(input.size()));
    packed.push_back(static_cast<std::uint8_t>(input.size() >> 8));
    packed.insert(packed.end(), input.begin(), input.end());
  }
  WriteFile(path, packed);
}

int Fuzz(const Asked& asked) {
  const fs::path crashes = asked.corpus / "crashes", kept = asked.corpus / "corpus";
  fs::create_directories(crashes);
  fs::create_directories(kept);
  std::snprintf(crash_path, sizeof crash_path, "%s", (crashes / "crash").c_str());
  signal(SIGALRM, OnSignal);
  signal(SIGABRT, OnSignal);
  __sanitizer_set_death_callback(WriteRunning);
  if (!asked.replay.empty()) {
    std::snprintf(crash_path, sizeof crash_path, "/dev/null");
    RunOne(ReadFile(asked.replay));
    std::puts("read, or refused in a sentence");
    return 0;
  }
  std::vector<Bytes> corpus;
  std::vector<std::vector<std::size_t>> of_target(Targets().size());
  const auto keep = [&](const Bytes& input) {
    of_target[input[0] % Targets().size()].push_back(corpus.size());
    corpus.push_back(input);
  };
  for (const Bytes& input : FirstInputs(asked)) {
    if (input.empty()) continue;
    RunOne(input);
    IsNew();
    keep(input);
  }
  if (corpus.empty()) throw std::invalid_argument("fuzz: no target " + asked.target);
  if (!asked.pack.empty()) return Pack(corpus, asked.pack), 0;
  std::vector<std::size_t> active;
  for (std::size_t number = 0; number < of_target.size(); ++number) {
    if (!of_target[number].empty()) active.push_back(number);
  }
  Random random(asked.seed);
  std::uint64_t runs = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto left = [&] {
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    return taken.count() < asked.seconds && runs < asked.runs;
  };
  while (left()) {
    // Half of the time one of the newest inputs.
    const auto& own = of_target[active[random() % active.size()]];
    const std::size_t recent = random() % 2 == 0 ? std::min<std::size_t>(own.size(), 16) : own.size();
    const Bytes one = corpus[own[own.size() - 1 - random() % recent]], other = corpus[own[random() % own.size()]];
    RunOne(one);  // for the operands of its comparisons
    for (int more = 0; more < 8 && left(); ++more) {
      const Bytes input = Changed(one, other, random);
      RunOne(input);
      ++runs;
      if (!IsNew()) continue;
      WriteFile(kept / NameOf(input), input);
      keep(input);
      break;
    }
  }
  std::printf("%llu runs, %zu inputs, %zu edges\n", static_cast<unsigned long long>(runs), corpus.size(), EdgeCount());
  return 0;
}

}  // namespace

void Fail(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

}  // namespace tersetorch::fuzz

// ---- what instrumented code calls; this file is compiled without instrumentation

using namespace tersetorch::fuzz;

extern "C" {
void __sanitizer_cov_trace_pc() {
  const auto place = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  std::uint8_t& count = hits[Mixed(place ^ (place_before << 1))];
  count += count != 255;
  place_before = place;
}
#define TERSETORCH_PLACE reinterpret_cast<std::uintptr_t>(__builtin_return_address(0))
void __sanitizer_cov_trace_cmp1(std::uint8_t a, std::uint8_t b) { Compared(TERSETORCH_PLACE, a, b, 1); }
void __sanitizer_cov_trace_cmp2(std::uint16_t a, std::uint16_t b) { Compared(TERSETORCH_PLACE, a, b, 2); }
void __sanitizer_cov_trace_cmp4(std::uint32_t a, std::uint32_t b) { Compared(TERSETORCH_PLACE, a, b, 4); }
void __sanitizer_cov_trace_cmp8(std::uint64_t a, std::uint64_t b) { Compared(TERSETORCH_PLACE, a, b, 8); }
void __sanitizer_cov_trace_const_cmp1(std::uint8_t a, std::uint8_t b) { Compared(TERSETORCH_PLACE, a, b, 1); }
void __sanitizer_cov_trace_const_cmp2(std::uint16_t a, std::uint16_t b) { Compared(TERSETORCH_PLACE, a, b, 2); }
void __sanitizer_cov_trace_const_cmp4(std::uint32_t a, std::uint32_t b) { Compared(TERSETORCH_PLACE, a, b, 4); }
void __sanitizer_cov_trace_const_cmp8(std::uint64_t a, std::uint64_t b) { Compared(TERSETORCH_PLACE, a, b, 8); }
void __sanitizer_cov_trace_cmpf(float, float) {}
void __sanitizer_cov_trace_cmpd(double, double) {}
void __sanitizer_cov_trace_switch(std::uint64_t value, const std::uint64_t* cases) {
  for (std::uint64_t i = 0; i < cases[0]; ++i) {
    Compared(TERSETORCH_PLACE + i, value, cases[2 + i],
             static_cast<int>(std::clamp<std::uint64_t>(cases[1] / 8, 1, 8)));
  }
}
}

int main(int count, char** arguments) {
  try {
    return Fuzz(ReadArguments(count, arguments));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
