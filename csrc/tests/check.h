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

// The test that runs, and whether its first failed check ends the program.
inline const char*& running() {
  static const char* name = "";
  return name;
}
inline bool& stops() {
  static bool value = false;
  return value;
}

inline void fail() {
  ++failures();
  if (!stops()) return;
  std::cout << "FAIL " << running() << std::endl;
  std::exit(1);
}

struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

template <class A, class B>
bool equal(const A& a, const B& b, const char* text_a, const char* text_b, const char* file, int line) {
  if (a == b) return true;
  std::cerr << file << ":" << line << ": " << text_a << " == " << text_b << " failed: " << a << " against " << b << "\n";
  fail();
  return false;
}

// Runs all tests, or those whose names hold one of the arguments. --first as one of them: stops at the first failure.
inline int run_all(int num_arguments, char** arguments) {
  size_t run = 0;
  std::vector<const char*> parts;
  for (int i = 1; i < num_arguments; ++i) {
    if (std::strcmp(arguments[i], "--first") == 0)
      stops() = true;
    else
      parts.push_back(arguments[i]);
  }
  for (const Case& test : cases()) {
    bool wanted = parts.empty();
    for (const char* part : parts) wanted = wanted || std::strstr(test.name, part) != nullptr;
    if (!wanted) continue;
    const int before = failures();
    running() = test.name;
    test.run();
    ++run;
    std::cout << (failures() == before ? "ok   " : "FAIL ") << test.name << std::endl;
  }
  std::cout << run << " tests, " << failures() << " failed checks\n";
  return failures() == 0 && run != 0 ? 0 : 1;
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
      check::fail();                                                                 \
    }                                                                                \
  } while (false)

#define CHECK_EQ(a, b) check::equal((a), (b), #a, #b, __FILE__, __LINE__)

#define TEST_MAIN() \
  int main(int num_arguments, char** arguments) { return check::run_all(num_arguments, arguments); }
