// What test_native.py asks of the library beyond liger-run.
//   encode BUNDLE            strings on stdin, each ended by NUL -> a line of ids for each
//   rows BUNDLE RUNTIME      ragged rows at once against each row alone
//   threads BUNDLE RUNTIME N N forks of one session, a thread each, against a lone session; megabytes a fork
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>

#include "liger/liger.h"

namespace {

template <class T>
T take(liger::Result<T> result) {
  if (result) return std::move(*result);
  std::fprintf(stderr, "error: %s\n", result.error().message.c_str());
  std::exit(2);
}

std::unique_ptr<liger::Session> open(char** words) {
  liger::Options options;
  options.runtime = words[3];
  options.threads = 1;
  return take(liger::open_session(take(liger::Bundle::open(words[2])), options));
}

int encode(char** words) {
  const auto text = take(liger::Text::open(take(liger::Bundle::open(words[2]))));
  for (std::string line; std::getline(std::cin, line, '\0');) {
    for (auto id : take(text.encode(line))) std::printf("%lld ", static_cast<long long>(id));
    std::puts("");
  }
  return 0;
}

std::vector<std::int64_t> numbers(std::int64_t count, std::int64_t seed) {
  std::vector<std::int64_t> ids;
  for (std::int64_t i = 0; i < count; ++i) ids.push_back((seed * 31 + i * i * 7 + i) % 2000);
  return ids;
}

int rows(char** words) {
  auto session = open(words);
  const std::vector<std::int64_t> valid{300, 1, 270};
  std::vector<std::int64_t> all;
  for (std::int64_t row = 0; row < 3; ++row) {
    auto ids = numbers(300, row);
    all.insert(all.end(), ids.begin(), ids.end());
  }
  auto together = take(session->prefill(all, 3, valid));
  std::vector<float> first(together.data, together.data + 3 * together.vocab);
  auto next = take(session->step({5, 6, 7}));
  double worst = 0;
  auto lone = take(session->fork());
  for (std::int64_t row = 0; row < 3; ++row) {
    lone->reset();
    auto ids = numbers(valid[static_cast<std::size_t>(row)], row);
    auto alone = take(lone->prefill(ids));
    for (std::int64_t i = 0; i < alone.vocab; ++i)
      worst = std::fmax(worst, std::fabs(alone.data[i] - first[static_cast<std::size_t>(row * alone.vocab + i)]));
    alone = take(lone->step({5 + row}));
    for (std::int64_t i = 0; i < alone.vocab; ++i) worst = std::fmax(worst, std::fabs(alone.data[i] - next.row(row)[i]));
  }
  std::printf("%g\n", worst);
  return 0;
}

// Megabytes of this process that are in memory.
double resident() {
  long pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
    if (std::fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  return static_cast<double>(pages) * 4096e-6;
}

int threads(char** words) {
  auto session = open(words);
  take(session->prefill(numbers(40, 1)));
  const int count = std::atoi(words[4]);
  auto run = [](liger::Session& mine, std::int64_t token, std::vector<std::int64_t>& out) {
    for (int i = 0; i < 20; ++i) out.push_back(token = liger::argmax(take(mine.step({token}))));
  };
  std::vector<std::vector<std::int64_t>> found(static_cast<std::size_t>(count)), lone = found;
  std::vector<std::unique_ptr<liger::Session>> forks;
  for (int i = 0; i < count; ++i) forks.push_back(take(session->fork()));
  run(*forks[0], 0, found[0]), found[0].clear(), forks[0] = take(session->fork());
  const double before = resident();
  std::vector<std::thread> workers;
  for (int i = 0; i < count; ++i)
    workers.emplace_back([&, i] { run(*forks[static_cast<std::size_t>(i)], i, found[static_cast<std::size_t>(i)]); });
  for (auto& worker : workers) worker.join();
  const double each = (resident() - before) / count;
  for (int i = 0; i < count; ++i) run(*take(session->fork()), i, lone[static_cast<std::size_t>(i)]);
  std::printf("%s %.4f\n", found == lone ? "equal" : "different", each);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string question = count > 2 ? words[1] : "";
  if (question == "encode") return encode(words);
  if (question == "rows" && count > 3) return rows(words);
  if (question == "threads" && count > 4) return threads(words);
  return 2;
}
