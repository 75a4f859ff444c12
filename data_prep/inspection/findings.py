"""Defines what an inspection of a source finds; data classes only.

`as_json` is the format of `inspect.json` and of `flexunet inspect --json`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_prep.masks.color_map import Color
from data_prep.splits.group_candidates import GroupCandidate

FORMAT_VERSION = 1  # of inspect.json; increased when a name changes its meaning


@dataclasses.dataclass(frozen=True)
class FolderFinding:
    """A pair of folders of images and masks, relative to the source; "" is the source.

    Attributes:
        split: its ready-made split, None without one.
        num_pairs: images with a mask.
    """

    images: str
    masks: str
    split: str | None
    field_of_view: str | None
    num_pairs: int


@dataclasses.dataclass(frozen=True)
class FilesFinding:
    """Files with the same problem, or in the same folder.

    Attributes:
        about: the problem, or the folder.
        number: how many files.
        examples: the first few of them.
    """

    about: str
    number: int
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LayoutFinding:
    """The folders of a source, and the rule that pairs its files.

    Attributes:
        rule: how names of images and masks belong together, in words.
        problem: why `prep` cannot use the source as it is; None if it can.
        left_over: files of the folders without a partner, or of another kind, by their problem.
        other_files: files of the source in other folders, by folder; not all of them if there are
            very many.
    """

    folders: tuple[FolderFinding, ...]
    rule: str
    num_pairs: int
    problem: str | None
    left_over: tuple[FilesFinding, ...]
    other_files: tuple[FilesFinding, ...]


@dataclasses.dataclass(frozen=True)
class ImagesFinding:
    """The images as they are stored in their files.

    Attributes:
        sizes: (height, width, number of images), the commonest first.
        channels: number of images by "grey", "RGB", "RGB with equal channels" or "N channels".
        bit_depths: number of images by bits of a channel.
        file_kinds: number of images by kind: PNG, JPEG, ...
        full_scale: value of full intensity that `prep` would find.
        smallest_max, largest_max: lowest and highest maximum of an image.
        num_blank: images of one value.
    """

    number: int
    sizes: tuple[tuple[int, int, int], ...]
    channels: Mapping[str, int]
    bit_depths: Mapping[int, int]
    file_kinds: Mapping[str, int]
    full_scale: int
    smallest_max: int
    largest_max: int
    num_blank: int


@dataclasses.dataclass(frozen=True)
class ValueFinding:
    """A value or colour of the masks.

    Attributes:
        value: an id, a grey level or r,g,b.
        color: how to show it.
        looks_like: class with its name, ignored, area of no class, unknown.
        share: share of all pixels of masks, 0..1.
        num_files: files with it; 0 if not known.
    """

    value: str
    color: Color | None
    looks_like: str
    share: float
    num_files: int


@dataclasses.dataclass(frozen=True)
class OthersFinding:
    """Many values of the same kind: noise of classes, blends at edges, rare values."""

    looks_like: str
    num_values: int
    share: float


@dataclasses.dataclass(frozen=True)
class MasksFinding:
    """The mask files and their values.

    Attributes:
        file_kinds: number of files by kind.
        values: the values, classes first.
        others: values that are not listed, by kind.
        encoding, classes, ignore: the options of `prep` that read these masks; None if that is not
            certain, and for `ignore` if nothing is ignored.
        evidence: why, in sentences.
    """

    number: int
    file_kinds: Mapping[str, int]
    values: tuple[ValueFinding, ...]
    others: tuple[OthersFinding, ...]
    encoding: str | None
    classes: str | None
    ignore: str | None
    evidence: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class DuplicatesFinding:
    """Images with the same pixels.

    Attributes:
        sets: names of equal images, the first few sets.
        num_sets: number of sets.
        num_images: images in them.
        num_across_splits: sets with images in several ready-made splits.
    """

    sets: tuple[tuple[str, ...], ...]
    num_sets: int
    num_images: int
    num_across_splits: int


@dataclasses.dataclass(frozen=True)
class RegionsFinding:
    """The connected regions of a class in the sampled masks.

    Attributes:
        num_images: images that have the class.
        share: share of the pixels of the sampled masks, 0..1.
        min_area: smallest area that counts, pixels: 4, or 16 in masks with noise or blends.
        num_tiny: smaller regions, which are often noise.
        number: number of the other regions.
        median, smallest: median and 5th percentile of their areas, pixels.
        lost: stored size such as "512x512" -> regions that it would lose.
    """

    class_name: str
    num_images: int
    share: float
    min_area: int
    num_tiny: int
    number: int
    median: int
    smallest: int
    lost: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class SizeFinding:
    """The proposed size of the stored images.

    Attributes:
        options: of `prep`, such as `image_size`; empty for its defaults.
        reason: why.
        num_sampled: masks that were measured.
    """

    options: Mapping[str, Any]
    reason: str
    num_sampled: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a question, and the `prep` command for it."""

    text: str
    command: str


@dataclasses.dataclass(frozen=True)
class Question:
    """What only the user can decide before `prep`, and its answers.

    Attributes:
        about: "layout", "masks", "groups", "validation", "bad files" or "leaks".
    """

    about: str
    text: str
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `flexunet.inspect` found in a source.

    Attributes:
        source: its folder or URL.
        groups: groups by the given rule, or by rules that names may hint at.
        command: the `flexunet prep` command that is proposed; if there are questions, with the
            first answer to those without which `prep` stops. None if no command can work.
        questions: what only the user can decide.
        bad_files: files that cannot be read or contradict another file, by their problem.
        exit_code: of `flexunet inspect`: 0; 2: something is not found or has several readings;
            3: some files are bad.
    """

    source: str
    layout: LayoutFinding
    images: ImagesFinding | None
    masks: MasksFinding | None
    groups: tuple[GroupCandidate, ...]
    duplicates: DuplicatesFinding | None
    regions: tuple[RegionsFinding, ...]
    size: SizeFinding | None
    bad_files: tuple[FilesFinding, ...]
    questions: tuple[Question, ...]
    command: str | None

    @property
    def exit_code(self) -> int:
        """Exit code of the command; see the class."""
        is_open = self.masks is not None and self.masks.encoding is None
        if self.layout.problem is not None or self.command is None or is_open:
            return 2
        return 3 if self.bad_files else 0

    def as_json(self) -> dict[str, Any]:
        """Returns all fields as JSON values."""
        values = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, "exit_code": self.exit_code} | values
