// Schemas of torch.ops.patchcore_ext: one place to read what the ops take and give. Meanings and checks: patchcore_ext/ops.py.
#include "torch_compat.h"

STABLE_TORCH_LIBRARY(patchcore_ext, library) {
  library.def("first_nonfinite_row(Tensor features) -> Tensor");
  library.def("square_root(Tensor values) -> Tensor");
  library.def("random_projection(Tensor features, Tensor matrix) -> Tensor");
  library.def("update_min_distances(Tensor features, Tensor centers, Tensor(a!) min_distances) -> ()");
  library.def("coreset_codes(Tensor features, Tensor center, Tensor prefix) -> Tensor");
  library.def(
      "greedy_coreset(Tensor features, Tensor(a!) min_distances, int count, Tensor? codes=None) -> (Tensor indices, Tensor squared_distances)");
  library.def(
      "greedy_coreset_lazily(Tensor features, Tensor(a!) min_distances, Tensor(b!) lowered, Tensor picks, int count, Tensor codes) -> "
      "(Tensor indices, Tensor squared_distances)");
  library.def("add_picks(Tensor features, Tensor picks, Tensor(a!) min_distances, Tensor codes) -> ()");
  library.def("prepare_bank(Tensor bank, Tensor center, Tensor matrix, int short_outputs, Tensor order) -> Tensor");
  library.def("nearest_neighbors(Tensor queries, Tensor bank, int k, Tensor? prepared=None) -> (Tensor squared_distances, Tensor indices)");
  library.def(
      "image_scores(Tensor squared_distances, Tensor nearest_indices, Tensor queries, Tensor bank, int num_neighbors, Tensor? prepared=None) -> "
      "Tensor");
  library.def(
      "score_patches(Tensor queries, Tensor bank, int num_patches, int num_neighbors, Tensor? prepared=None) -> "
      "(Tensor image_scores, Tensor patch_distances, Tensor nearest_indices)");
}
