// The smallest test harness that serves: TEST(name) { CHECK(...); CHECK_EQ(a, b); } and one main() per file through TEST_MAIN().
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <vector>

namespace check {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

template <class A, class B>
bool equal(const A& a, const B& b, const char* text_a, const char* text_b, const char* file, int line) {
  if (a == b) return true;
  std::cerr << file << ":" << line << ": " << text_a << " == " << text_b << " failed: " << a << " against " << b << "\n";
  ++failures();
  return false;
}

// Runs all tests, or those whose names hold one of the arguments.
inline int run_all(int count, char** arguments) {
  int run = 0;
  for (const Case& test : cases()) {
    bool wanted = count < 2;
    for (int i = 1; i < count; ++i) wanted = wanted || std::strstr(test.name, arguments[i]) != nullptr;
    if (!wanted) continue;
    ++run;
    const int before = failures();
    test.run();
    std::cout << (failures() == before ? "ok   " : "FAIL ") << test.name << "\n";
  }
  std::cout << run << " tests, " << failures() << " failed checks\n";
  return failures() == 0 && run > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                     \
  static void name();                                  \
  static check::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << " failed\n"; \
      ++check::failures();                                                           \
    }                                                                                \
  } while (false)

#define CHECK_EQ(a, b) check::equal((a), (b), #a, #b, __FILE__, __LINE__)

#define TEST_MAIN() \
  int main(int count, char** arguments) { return check::run_all(count, arguments); }
