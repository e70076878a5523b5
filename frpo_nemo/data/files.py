"""Find the files that a path means: one file, a pattern, or the files of one split in a directory.

A directory is read whole: a file belongs to the split that its name or a folder names (train, validation, test or a
synonym), and to train when they name none. `datasets` would take only the files called train if there are any, and only the
commonest format of these, and *.bak too. It does resolve the card of a data set that was copied from the hub.
"""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import datasets
from huggingface_hub import metadata_load

from frpo_nemo.data.readers import COMPRESSIONS, READERS, format_of
from frpo_nemo.errors import ConfigError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Name of a part of a split, such as train_sft-00000-of-00003; the hub added a hash for a while.
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
# Files that describe a data set and hold no rows.
DESCRIPTIONS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
FORMATS = f"{', '.join(READERS)}, also {' and '.join(COMPRESSIONS)} of them"


@dataclass
class Files:
    """The data files of every split, in the order of their names, and the files that aren't data. `root`: the folder to
    which names in messages are relative."""

    root: Path
    splits: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    others: list[Path] = field(default_factory=list)

    def name(self, file: Path) -> str:
        return str(file.relative_to(self.root)) if file.is_relative_to(self.root) else str(file)

    def left_out(self, splits: Iterable[str]) -> str:
        """Return a clause on the files that are not of `splits`, empty if there is none."""
        read = {file for name in splits for file in self.splits[name]}  # a file may belong to several
        reasons = {f"split {name}": files for name, files in self.splits.items()} | {"no data": self.others}
        unread = {reason: [file for file in files if file not in read] for reason, files in reasons.items()}
        clauses = [f"{self._listed(files)} ({reason})" for reason, files in unread.items() if files]
        return f"; left out: {', '.join(clauses)}" if clauses else ""

    def _listed(self, files: list[Path]) -> str:
        return listed([self.name(file) for file in files])


def listed(names: list[str], most: int = 8) -> str:
    """Return `names` separated by commas, only the first `most` of them."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def split_names(split: str) -> list[str]:
    """Return the splits of which `split` takes all or a part, such as train[:10%]."""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def find_files(path: str, split: str = "train") -> Files | None:
    """Return the data files that `path` means; None: `datasets` must read it, from disk or the hub. `split`: the one wanted.
    Raises ConfigError when there is no file, or when it is unclear which is meant."""
    place = Path(path).expanduser()
    if place.is_dir():
        return _of_card(place, None) if _has_card(place) else _of_directory(place)
    if place.exists() or (format_of(place) and not glob.has_magic(path)):
        return _of_file(place, split_names(split))
    if glob.has_magic(path):
        return _of_pattern(place)
    directory, colon, configuration = path.rpartition(":")
    place = Path(directory).expanduser()
    if not colon or not place.is_dir():
        return None
    if not _has_card(place):
        raise ConfigError(
            f"data directory '{place}' has no configuration '{configuration}': no README.md there names one; give the "
            "path of a directory or file"
        )
    return _of_card(place, configuration)


def _of_file(file: Path, asked: list[str]) -> Files:
    """Return one file as train, and also as the split in its name if that is another, as train_prefs but not as test."""
    if not file.is_file():
        raise ConfigError(f"data file '{file}' does not exist (working directory: {Path.cwd()})")
    if format_of(file) is None:
        raise ConfigError(f"data file '{file}' has a name without a known format: {FORMATS}")
    if file.stat().st_size == 0:
        raise ConfigError(f"data file '{file}' has no rows: it is empty")
    own = _splits_of(Path(file.name)) or {"train"}
    return Files(
        file.parent, {name: [file] for name in {"train", *own, *(name for name in asked if _words(name) & own)}}
    )


def _of_directory(root: Path) -> Files:
    if (root / f"{root.name}.py").is_file():
        raise ConfigError(f"data directory '{root}' has {root.name}.py: loading scripts are no longer supported")
    found = Files(root)
    for file in _sorted(glob.glob(f"{glob.escape(str(root))}/**", recursive=True)):
        if format_of(file) is None or file.name in DESCRIPTIONS:
            found.others.append(file)
            continue
        splits = _splits_of(file.relative_to(root)) or {"train"}
        if len(splits) > 1:
            raise ConfigError(
                f"data directory '{root}': '{found.name(file)}' names the splits {' and '.join(sorted(splits))}; rename "
                "it, or give files or a pattern (DIR/*.jsonl) as path"
            )
        found.splits[splits.pop()].append(file)
    return _checked(found, f"data directory '{root}'")


def _of_pattern(pattern: Path) -> Files:
    """Return the files of a pattern as one split, whatever splits their names mention."""
    found = Files(Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts)))
    for file in _sorted(glob.glob(str(pattern), recursive=True)):
        (found.splits["train"] if format_of(file) else found.others).append(file)
    return _checked(found, f"data source '{pattern}'")


def _of_card(root: Path, configuration: str | None) -> Files | None:
    """Return the files that the README.md of a copied data set names; None if a format isn't one that is read here."""
    found = datasets.load_dataset_builder(str(root), configuration).config.data_files
    splits = {str(split): [Path(file) for file in files] for split, files in found.items()}
    if not all(format_of(file) for files in splits.values() for file in files):
        return None
    return Files(root.resolve(), splits)


def _has_card(root: Path) -> bool:
    readme = root / "README.md"
    return readme.is_file() and "configs" in (metadata_load(readme) or {})


def _sorted(names: Iterable[str]) -> list[Path]:
    return sorted(file for file in map(Path, names) if file.is_file())


def _splits_of(file: Path) -> set[str]:
    """Return the splits that the words of a relative path name. train_sft-00000-of-00003 belongs to train_sft."""
    stem = _without_suffixes(file)
    shard = SHARD.fullmatch(stem.name)
    splits = _words(str(stem))
    if splits and shard and shard[1] not in SPLITS:
        return {shard[1]}
    return splits


def _words(text: str) -> set[str]:
    """Return the splits that words of `text` mean."""
    return {SPLITS[word] for word in re.findall("[a-z]+", text.lower()) if word in SPLITS}


def _without_suffixes(file: Path) -> Path:
    suffix, packed = format_of(file)
    return file.with_name(file.name[: -len(suffix + (packed or ""))])


def _checked(found: Files, where: str) -> Files:
    """Raise ConfigError when there is no file, or one twice: by a link, or with the same rows in another format."""
    if not found.splits:
        raise ConfigError(f"{where} has no data file ({FORMATS}; working directory: {Path.cwd()}){found.left_out(())}")
    by_link, by_format = "are one file (a link)", "seem to hold the same rows in two formats"
    for split, files in found.splits.items():
        seen: dict[Path, Path] = {}
        for file in files:
            for same, key in ((by_link, file.resolve()), (by_format, _without_suffixes(file))):
                first = seen.setdefault(key, file)
                if first != file:
                    raise ConfigError(
                        f"{where}: '{found.name(first)}' and '{found.name(file)}' (split {split}) {same}; give the path of "
                        "one, or a pattern (DIR/*.jsonl)"
                    )
    return found
