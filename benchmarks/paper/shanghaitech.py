"""ShanghaiTech Campus (Liu et al. 2018): videos of 12 scenes as an image data set, every other frame, one model a scene.

Layout: ``training/frames/SS_VVV/*.jpg`` (of the .avi files, which have to be taken apart), ``testing/frames/SS_VVVV/*.jpg``, and of each test video
``testing/test_frame_mask/SS_VVVV.npy`` [frames] and ``testing/test_pixel_mask/SS_VVVV.npy`` [frames, height, width]. The scene is SS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from patchcore_ext.images import find_images
from patchcore_ext.layout import DatasetClass, LabelledImage
from patchcore_ext.memory_bank import atomic_write

EVERY = 2  # frames


def read(root: Path, masks: Path) -> tuple[list[DatasetClass], tuple[str, ...]]:
    """The scenes as classes.

    Args:
        root: the data set's folder.
        masks: a folder into which the masks of the frames that are used are written, as PNG.

    Raises:
        ValueError: another layout, or masks that are not one a frame.
    """
    train = _videos(root / "training" / "frames")
    test = _videos(root / "testing" / "frames")
    if not train or not test:
        hint = "; take the .avi files of training/videos apart first" if (root / "training" / "videos").is_dir() and not train else ""
        raise ValueError(
            f"paper: expected {str(root)!r} to hold training/frames/<video> and testing/frames/<video>, got {len(train)} and {len(test)} videos{hint}."
        )
    classes = []
    for scene in sorted({video.name.split("_")[0] for video in train}):
        nominal = [path for video in train if video.name.split("_")[0] == scene for path in find_images(str(video))[::EVERY]]
        tested = [image for video in test if video.name.split("_")[0] == scene for image in _labelled(root, video, masks)]
        if tested:
            classes.append(DatasetClass(scene, tuple(nominal), tuple(tested), ()))
    kept = [item for item in classes if {image.is_defective for image in item.test} == {True, False}]
    left_out = sorted({item.name for item in classes} - {item.name for item in kept})
    notes = [f"Every {EVERY}nd frame of the training and test videos."]
    if left_out:
        notes.append(f"Scenes without normal or without anomalous test frames are left out: {', '.join(left_out)}.")
    return kept, tuple(notes)


def _videos(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _labelled(root: Path, video: Path, masks: Path) -> Iterator[LabelledImage]:
    frames = find_images(str(video))
    frame_mask, pixel_mask = (root / "testing" / kind / f"{video.name}.npy" for kind in ("test_frame_mask", "test_pixel_mask"))
    pixels = np.load(pixel_mask, mmap_mode="r") if pixel_mask.is_file() else None
    if frame_mask.is_file():
        labels = np.load(frame_mask).astype(bool)
    elif pixels is not None:
        labels = np.array([bool(pixels[index].any()) for index in range(len(pixels))])
    else:
        raise ValueError(f"paper: expected {frame_mask} or {pixel_mask}, got neither.")
    for name, found in (("frame mask", labels), ("pixel mask", pixels)):
        if found is not None and len(found) != len(frames):
            raise ValueError(f"paper: expected the {name} of video {video.name} to have an entry for each of its {len(frames)} frames, got {len(found)}.")
    for index in range(0, len(frames), EVERY):
        if not labels[index]:
            yield LabelledImage(frames[index], "good", None)
        else:
            marked = None if pixels is None else _written(masks / video.name / f"{Path(frames[index]).stem}_mask.png", pixels[index])
            yield LabelledImage(frames[index], "anomalous", marked)


def _written(path: Path, mask: Sequence[Sequence[int]]) -> str:
    """The path of the mask as an image."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            PIL.Image.fromarray((np.asarray(mask) != 0).astype(np.uint8) * 255).save(temporary, format="PNG")
    return str(path)
