"""Find the images that the IMAGE arguments name, the files of each image, and a unique name for its keys."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

RASTER_ENDINGS = (".tif", ".tiff", ".jp2", ".img", ".dat", ".bsq", ".bil", ".bip", ".npy")
SIDE_CAR_ENDINGS = (".hdr", ".xml", ".aux", ".ovr", ".msk", ".prj", ".rpb", ".wld", ".tfw", ".j2w", ".jgw")
"""Endings of metadata files of a raster."""
MASK_ENDING = "_mask"
NO_MASK_ENDINGS = {".txt", *SIDE_CAR_ENDINGS} - {".hdr"}
"""Endings of `NAME_mask` files that are not masks. An ENVI header may belong to a mask file without ending."""
MAX_NAME_CHARS = 54
"""Limit of a name. A key is the name, a number if two names are equal, and the tile position: under 80 characters."""


@dataclass(frozen=True)
class ImageSource:
    """One image: a raster of several bands, or a folder with one file per band."""

    path: Path
    files: tuple[Path, ...]
    stem: str
    """Name without ending. The leaf mask is `{stem}_mask.png`, for example."""
    masks: tuple[Path, ...] = ()
    """Files in the same folder that are named `{stem}_mask`, with any ending."""
    name: str = ""
    """Start of the keys of its tiles, unique among the images of a run."""

    @property
    def one_file_per_band(self) -> bool:
        """True if `path` is a folder of band files."""
        return self.files != (self.path,)

    @property
    def file_names(self) -> list[str]:
        """File names as recorded with every tile, without the folder on this machine."""
        return [f"{self.path.name}/{f.name}" if self.one_file_per_band else f.name for f in self.files]


def find_sources(
    images: Sequence[Path], band_files: Sequence[str], mask_files: str | None = None
) -> list[ImageSource]:
    """Return the images that `images` names: rasters, folders of rasters, or with `band_files` folders of band files.

    A file that is the mask of another image, by its name or by the pattern `mask_files`, is not an image.

    Raises: ValueError if a path does not exist, a folder holds no raster, a band file is missing, or an image is named
    twice.
    """
    if not images:
        raise ValueError("got no images; name raster files or folders of them")
    found: list[tuple[Path, tuple[Path, ...]]] = []
    for image in images:
        path = image.resolve()
        if not path.exists():
            raise ValueError(f"{image} does not exist; name raster files or folders of them")
        if band_files:
            found.append((path, _files_of_bands(path, band_files)))
        else:
            found += [(raster, (raster,)) for raster in _rasters(path)]
    stems = {path: path.name if band_files else path.stem for path, _ in found}
    masks = {mask for path, stem in stems.items() for mask in mask_paths(path, stem, mask_files) if mask != path}
    found = [(path, files) for path, files in found if path.with_suffix("") not in masks and path not in masks]
    for path, count in Counter(path for path, _ in found).items():
        if count > 1:
            raise ValueError(f"{path} is named {count} times; name it once, or its tiles leak between splits")
    mask_files_of = _masks_in({path.parent for path, _ in found})
    sources = [
        ImageSource(path, files, stems[path], tuple(mask_files_of[path.with_name(f"{stems[path]}{MASK_ENDING}")]))
        for path, files in found
    ]
    return _with_unique_names(sources)


def unused_files(images: Sequence[Path], sources: Sequence[ImageSource], mask_files: str | None) -> Iterator[str]:
    """Yield a notice for each folder of `images` with files that are neither raster nor mask nor metadata."""
    masks = {mask for source in sources for mask in mask_paths(source.path, source.stem, mask_files)}
    used = {source.path for source in sources}
    known = masks | {folder for mask in masks for folder in mask.parents} | used
    for image in images:
        folder = image.resolve()
        if not folder.is_dir() or folder in used:  # a folder of band files
            continue
        unused = [
            path.name
            for path in sorted(folder.iterdir())
            if not {path, path.with_suffix("")} & known
            and not path.name.startswith(".")
            and not path.stem.endswith(MASK_ENDING)
            and path.suffix.lower() not in SIDE_CAR_ENDINGS
        ]
        if unused:
            yield (
                f"not used in {image}: {_some(unused)}; only *{', *'.join(RASTER_ENDINGS)} in the folder itself are "
                "found, so name any other raster as an IMAGE of its own"
            )


def mask_paths(image: Path, stem: str, pattern: str | None) -> list[Path]:
    """Return the possible paths of the mask of an image.

    A pattern is relative to the folder of the image or to the current folder. Without a pattern, the path is
    `{stem}_mask` without ending.
    """
    if pattern is None:
        return [image.with_name(f"{stem}{MASK_ENDING}")]
    name = pattern.replace("{stem}", stem)
    return [image.parent / name, Path(name).resolve()]


def _files_of_bands(folder: Path, band_files: Sequence[str]) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; with --band-files each IMAGE is a folder with one file per band")
    files = tuple(folder / name for name in band_files)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks band file {', '.join(missing)} (it holds {_some_files(folder)}); "
            "correct --band-files or complete the folder"
        )
    return files


def _rasters(path: Path) -> Iterator[Path]:
    """Iterate over the raster at `path`, or over all rasters in that folder, sorted and without masks."""
    if not path.is_dir():
        yield _data_file(path)
        return
    inside = sorted(file for file in path.iterdir() if file.is_file())
    data = {file for file in inside if file.suffix.lower() in RASTER_ENDINGS}
    data |= {_data_file(file) for file in inside if file.suffix.lower() == ".hdr"}
    rasters = sorted(file for file in data if not file.stem.endswith(MASK_ENDING))
    if not rasters:
        raise ValueError(
            f"{path} holds no raster (*{', *'.join(RASTER_ENDINGS)}; it holds {_some_files(path)}); "
            "name the folder that holds the images"
        )
    yield from rasters


def _data_file(path: Path) -> Path:
    """Return the data file of an ENVI header, or any other path unchanged."""
    if path.suffix.lower() != ".hdr":
        return path
    for ending in ("", ".dat", ".img", ".bsq", ".bil", ".bip", ".raw"):
        if (data := path.with_suffix(ending)).is_file():
            return data
    raise ValueError(f"{path} is a header whose data file is missing; put it in the same folder")


def _some_files(folder: Path) -> str:
    return _some(sorted(file.name for file in folder.iterdir()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "nothing"


def _masks_in(folders: Iterable[Path]) -> dict[Path, list[Path]]:
    """Return the files named `*_mask`, by their path without ending."""
    found = defaultdict(list)
    for folder in folders:
        for file in sorted(folder.glob(f"*{MASK_ENDING}*")):
            if file.stem.endswith(MASK_ENDING) and file.suffix.lower() not in NO_MASK_ENDINGS and file.is_file():
                found[file.with_suffix("")].append(file)
    return found


def _with_unique_names(sources: Sequence[ImageSource]) -> list[ImageSource]:
    """Name each image by its stem, preceded by its folder if two stems are equal."""
    stems = [_clean(source.stem) for source in sources]
    counts = Counter(stems)
    used = {stem for stem in stems if counts[stem] == 1}
    named = []
    for source, stem in zip(sources, stems, strict=True):
        name = stem
        if counts[stem] > 1:
            prefixed = name = _clean(f"{source.path.parent.name}_{source.stem}")
            number = 1
            while name in used:
                number += 1
                name = f"{prefixed}-{number}"
            used.add(name)
        named.append(replace(source, name=name))
    return named


def _clean(text: str) -> str:
    """Return the text with letters, digits, `_` and `-` only. In WebDataset, a dot would end the key."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", text) or "image"
    if len(name) <= MAX_NAME_CHARS:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME_CHARS - 9]}-{digest}"
