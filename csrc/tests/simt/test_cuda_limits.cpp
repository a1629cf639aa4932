// The kernels within the limits of the GPUs that they are compiled for: a block of compute capability 7.5 has 64 KiB of dynamic shared memory, and a
// launch that asks for more fails. On the CPU only: a GPU checks its own limits.
#include "device.h"

using namespace patchcore;

namespace {

data::Set waves(int64_t count, int64_t dim) {
  return data::fill(data::make("waves", count, dim), [](int64_t r, int64_t j) { return std::sin(static_cast<double>(r * 7 + j * j)); });
}

// Runs `use` on a device with 64 KiB of shared memory for a block.
template <class F>
void on_turing(F&& use) {
  const int before = simt::device().shared_bytes_optin;
  simt::device().shared_bytes_optin = 64 << 10;
  use();
  simt::device().shared_bytes_optin = before;
}

}  // namespace

TEST(coreset_passes_fit_into_64_kib) {
  on_turing([] {
    for (const int64_t dim : {20, 100, 300}) {  // codes of 64, 128 and of any number of bytes
      data::Set set = waves(300, dim);
      const Rows& rows = data::rows_of(set);
      device::Picks picks = {device::Vector<double>(300, std::numeric_limits<double>::infinity()), {}, {}};
      device::CoresetCodes codes(rows);
      codes.select(5, 0, 1, &picks);
      CHECK_EQ(picks.indices.size(), 5u);
      codes.add(picks.indices, &picks.state);
    }
  });
}

TEST(searches_fit_into_64_kib) {
  on_turing([] {
    for (const int64_t dim : {20, 300}) {
      data::Set set = waves(300, dim);
      const Rows& bank = data::rows_of(set);
      for (const bool with_prefixes : {false, true}) {
        device::Prepared prepared(bank, with_prefixes);
        for (const int prefix : {-1, 0, 1}) {
          if (prefix == 1 && !with_prefixes) continue;
          const device::Neighbors found = prepared.search(bank, bank, 1, prefix);
          CHECK_EQ(found.indices[7], 7);
          CHECK_EQ(prepared.scores(found, bank, bank, 3, 9).size(), 3u);
        }
      }
    }
  });
}

TEST_MAIN()
