"""The model classes, built on anomalib's: imported through the package, when they are asked for."""

from __future__ import annotations

from typing import Any

from anomalib.models.image.patchcore.lightning_model import Patchcore as StockPatchcore
from anomalib.models.image.patchcore.torch_model import PatchcoreModel as StockPatchcoreModel
from torch import Tensor

from .sampler import KCenterGreedy
from .search import nearest, takes


class PatchcoreModel(StockPatchcoreModel):
    """anomalib's ``PatchcoreModel`` with our coreset and our search; arguments, buffers and outputs are the same."""

    def subsample_embedding(self, sampling_ratio: float, embeddings: Tensor | None = None) -> None:
        """Makes the memory bank from the patches that training has gathered; they are let go one by one, so that they are in memory once, not twice.

        Args:
            sampling_ratio: Share of patches to keep, in (0, 1].
            embeddings: Not used, as in anomalib.

        Raises:
            ValueError: No patches were gathered, or none would be kept.
        """
        if not self.embedding_store:
            raise ValueError("Embedding store is empty. Cannot perform coreset selection.")
        first = self.embedding_store[0]
        rows = first.new_empty((sum(len(part) for part in self.embedding_store), first.shape[1]))  # [N, D]
        end = len(rows)
        while self.embedding_store:
            part = self.embedding_store.pop()
            rows[end - len(part) : end] = part
            end -= len(part)
        self.memory_bank = KCenterGreedy(embedding=rows, sampling_ratio=sampling_ratio).sample_coreset()

    def nearest_neighbors(self, embedding: Tensor, n_neighbors: int) -> tuple[Tensor, Tensor]:
        """Distances and rows of the nearest neighbours in the memory bank: ``[Q, n_neighbors]``, or ``[Q]`` for one; anomalib's code while exporting."""
        if takes(embedding, self.memory_bank):
            return nearest(embedding, self.memory_bank, n_neighbors)
        found: tuple[Tensor, Tensor] = super().nearest_neighbors(embedding, n_neighbors)
        return found


class Patchcore(StockPatchcore):
    """anomalib's ``Patchcore`` for its Engine and command line, with our coreset and our search.

    Checkpoints go both ways: either class loads what the other has saved. A model exported by ``to_torch`` is a pickle of this class and needs patchcore_ext
    where it is opened; :func:`accelerate` leaves pickles of anomalib's own class.

    Args:
        *args: As of anomalib's ``Patchcore``.
        **kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The model that anomalib has built, backbone and precision included, with two methods of ours: the classes have the same attributes.
        self.model.__class__ = PatchcoreModel
