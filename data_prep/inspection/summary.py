"""Summarizes what was read: counts, duplicates, regions, the size, the questions, the command."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.imaging.stored_sizes import (
    MIN_AREA,
    ClassLoss,
    StoredSize,
    proposed_size,
)
from data_prep.inspection.findings import (
    DuplicatesFinding,
    FilesFinding,
    FolderFinding,
    ImagesFinding,
    Inspection,
    LayoutFinding,
    MasksFinding,
    Question,
    RegionsFinding,
    SizeFinding,
)
from data_prep.inspection.layout import FoundLayout
from data_prep.inspection.mask_values import Values, describe_values
from data_prep.inspection.questions import (
    Choice,
    area_choice,
    bad_choice,
    black_choice,
    group_choice,
    layout_choice,
    leak_choice,
    meaning_choice,
    proposals,
    valid_choice,
)
from data_prep.inspection.scan import BadFile, ClassRegions, ImageFacts, RegionsScan
from data_prep.masks.color_map import NO_BACKGROUND, Color, parse_color_map, with_background
from data_prep.masks.decision.decide import MaskDecision
from data_prep.masks.decision.findings import Reading, black_and_white
from data_prep.masks.statistics import MaskStatistics
from data_prep.shards.pixel_format import common_pixel_format
from data_prep.shards.source_pairs import SourcePair
from data_prep.sources.listings import Listings
from data_prep.sources.pairs import NO_MASK, Reject, describe_rule
from data_prep.splits.group_candidates import GroupCandidate
from flexunet.errors import FlexUNetError
from flexunet.storage import is_subpath, open_store
from flexunet.text import legible

GROUP_OPTIONS = ("group_preset", "group_regex", "group_csv")
_EXAMPLES = 3
_MAX_SETS = 10  # of equal images that are listed
_MAX_SETS_OF_VALUES = 1000
_MAX_OTHER_FILES = 100_000  # beside the folders of images and masks


@dataclass
class Measured:
    """All that was read.

    Attributes:
        items: the pairs, sorted by id.
        decision: how the masks are read; None without masks.
        reading: the certain or likeliest reading, None if there is none.
        sizes: the compared sizes of stored images.
        min_area: smallest region that is not tiny, pixels.
        regions: the regions of the sampled pairs.
        values: by id of each pair: values of its masks, see `FilesScan`.
    """

    layout: FoundLayout
    items: list[SourcePair] = field(default_factory=list)
    images: list[ImageFacts] = field(default_factory=list)
    masks: MaskStatistics = field(default_factory=MaskStatistics)
    mask_kinds: dict[str, int] = field(default_factory=dict)
    bad: list[BadFile] = field(default_factory=list)
    decision: MaskDecision | None = None
    reading: Reading | None = None
    sizes: tuple[StoredSize, ...] = ()
    min_area: int = MIN_AREA
    regions: RegionsScan = field(default_factory=RegionsScan)
    values: dict[str, Values | None] = field(default_factory=dict)

    _distinct: dict[Values | None, Values | None] = field(default_factory=dict)

    def interned(self, values: Values | None) -> Values | None:
        """Returns an equal object that many pairs share; None beyond a limit, to save memory."""
        if values not in self._distinct and len(self._distinct) >= _MAX_SETS_OF_VALUES:
            return None
        return self._distinct.setdefault(values, values)

    @property
    def areas(self) -> tuple[Color, ...]:
        """Values of no class for which masks cannot be read."""
        return tuple(dict.fromkeys(color for each in self.regions.bad for color in each.colors))

    @property
    def has_noise(self) -> bool:
        """Whether masks have values that are neither classes nor ignored."""
        return bool(describe_values(self.masks, self.reading)[1])


def summarize(
    source: str, found: Measured, groups: Sequence[GroupCandidate], listings: Listings
) -> Inspection:
    """Returns the findings, the questions and the command."""
    url = open_store(source).url
    duplicates = duplicates_of(found.images) if found.images else None
    regions = regions_of(found)
    size = _size(found, regions)
    bad = grouped_files(
        [*((each.file, each.reason) for each in (*found.bad, *found.regions.bad))], url
    )
    layout = _layout(url, found, listings)
    options = _certain_options(found, size)
    command: str | None = None
    questions: tuple[Question, ...] = ()
    if found.images and (found.decision is None or found.reading is not None):
        choices = _choices(found, groups, layout, bad, duplicates)
        command, questions = proposals(source, _output_name(url), options, choices)
    return Inspection(
        source=url,
        layout=layout,
        images=images_of(found) if found.images else None,
        masks=_masks(found),
        groups=tuple(groups),
        duplicates=duplicates,
        regions=regions,
        size=size,
        bad_files=bad,
        questions=questions,
        command=command,
    )


def count_sizes(images: Iterable[ImageFacts]) -> Counter[tuple[int, int]]:
    """Returns the number of images by (height, width)."""
    return Counter((image.height, image.width) for image in images)


def images_of(found: Measured) -> ImagesFinding:
    """Returns the facts about all images; there is at least one."""
    images = found.images
    scale = common_pixel_format(images, found.layout.config.full_scale).value_max
    sizes = count_sizes(images).most_common()
    maxima = [image.max_value for image in images]
    return ImagesFinding(
        number=len(images),
        sizes=tuple((height, width, number) for (height, width), number in sizes),
        channels=_counts(map(_channels, images)),
        bit_depths=_counts(image.bit_depth for image in images),
        file_kinds=_counts(image.file_kind for image in images),
        full_scale=scale,
        smallest_max=min(maxima),
        largest_max=max(maxima),
        num_blank=sum(image.is_blank for image in images),
    )


def _counts(values: Iterable[Any]) -> dict[Any, int]:
    return dict(Counter(values).most_common())


def _channels(image: ImageFacts) -> str:
    if image.file_channels == 3:
        return "RGB" if image.channels == 3 else "RGB with equal channels"
    return "grey" if image.file_channels == 1 else f"{image.file_channels} channels"


def duplicates_of(images: Sequence[ImageFacts]) -> DuplicatesFinding:
    """Returns the images with equal pixels; images of one value prove nothing."""
    by_pixels: dict[str, list[ImageFacts]] = defaultdict(list)
    for image in images:
        if not image.is_blank:
            by_pixels[image.sha256].append(image)
    sets = [found for found in by_pixels.values() if len(found) > 1]
    across = [found for found in sets if len({image.split for image in found}) > 1]
    ordered = sorted(sets, key=lambda found: (found not in across, found[0].filename))
    return DuplicatesFinding(
        sets=tuple(
            tuple(f"{i.split}/{i.filename}" if i.split else i.filename for i in found)
            for found in ordered[:_MAX_SETS]
        ),
        num_sets=len(sets),
        num_images=sum(map(len, sets)),
        num_across_splits=len(across),
    )


def regions_of(found: Measured) -> tuple[RegionsFinding, ...]:
    """Returns the regions of each foreground class in the sampled masks."""
    classes = _classes(found)
    result = []
    for class_id, name in list(enumerate(classes))[1:]:
        regions = found.regions.classes.get(class_id, ClassRegions())
        areas = {area: n for area, n in regions.areas.items() if area >= found.min_area}
        result.append(
            RegionsFinding(
                class_name=name,
                num_images=regions.num_images,
                share=regions.num_pixels / max(1, found.regions.num_pixels),
                min_area=found.min_area,
                num_tiny=sum(regions.areas.values()) - sum(areas.values()),
                number=sum(areas.values()),
                median=_percentile(areas, 0.5),
                smallest=_percentile(areas, 0.05),
                lost={str(size): regions.lost[size] for size in found.sizes},
            )
        )
    return tuple(result)


def _names_background(found: Measured) -> bool:
    """Returns whether the user says which class is the background."""
    return not {"classes", "background"}.isdisjoint(found.layout.given)


def _classes(found: Measured) -> list[str]:
    if not found.regions.num_pairs:
        return []
    config = found.layout.config
    text = config.classes if found.reading is None else found.reading.classes
    if text is None:
        classes = tuple(parse_color_map(black_and_white().classes))
    else:
        classes = with_background(parse_color_map(text), config.background).classes
    return [entry.name for entry in classes]


def _percentile(areas: Mapping[int, int], share: float) -> int:
    """Returns the area that this share of the regions does not exceed; 0 without regions."""
    if not areas:
        return 0
    values = sorted(areas)
    upto = np.cumsum([areas[value] for value in values])
    return values[int(np.searchsorted(upto, share * upto[-1]))]


def _size(found: Measured, regions: Sequence[RegionsFinding]) -> SizeFinding | None:
    if not found.images:
        return None
    losses = [
        ClassLoss(
            each.class_name, each.number, each.smallest, {s: each.lost[str(s)] for s in found.sizes}
        )
        for each in regions
    ]
    options, reason = proposed_size(count_sizes(found.images), found.sizes, losses)
    return SizeFinding(options, reason, found.regions.num_pairs)


def grouped_files(files: Iterable[tuple[str, str]], url: str) -> tuple[FilesFinding, ...]:
    """Returns files by their reason, the commonest first; numbers in a reason do not matter.

    Args:
        files: (URL of a file, reason) each.
        url: the source; names of examples are relative to it.
    """
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for file, reason in sorted(set(files)):
        plain = reason.removeprefix(f"{file}: ")
        groups[re.sub(r"\d+|/\S+", "#", plain)].append((_relative(file, url), plain))
    ordered = sorted(groups.values(), key=lambda each: -len(each))
    return tuple(
        FilesFinding(legible(each[0][1]), len(each), tuple(n for n, _ in each[:_EXAMPLES]))
        for each in ordered
    )


def _relative(file: str, url: str) -> str:
    return legible(file.removeprefix(url).strip("/")) or "."


def _layout(url: str, found: Measured, listings: Listings) -> LayoutFinding:
    paired = found.layout.paired
    pairs = () if paired is None else paired.pairs
    rejects = () if paired is None else paired.rejects
    counts = Counter(pair.image_url for pair in pairs)
    folders = tuple(
        FolderFinding(
            _relative(each.images, url),
            _relative(each.masks, url),
            each.split,
            None if each.views is None else _relative(each.views, url),
            counts[each.images],
        )
        for each in found.layout.sources
    )
    return LayoutFinding(
        folders=folders,
        rule="" if paired is None else describe_rule(paired.naming),
        num_pairs=len(pairs),
        problem=found.layout.problem,
        left_over=grouped_files(((each.file, each.reason) for each in rejects), url),
        other_files=_other_files(url, found.layout, rejects, listings),
    )


def _other_files(
    url: str, layout: FoundLayout, rejects: Sequence[Reject], listings: Listings
) -> tuple[FilesFinding, ...]:
    """Returns the files outside of the folders of images and masks; none if there are too many."""
    try:
        listings.check_number(url, _MAX_OTHER_FILES)
    except FlexUNetError:
        return ()
    used = {each for s in layout.sources for each in (s.images, s.masks, s.views) if each}
    known = {reject.file for reject in rejects}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in listings.names(url):
        folder = f"{url}/{name}".rpartition("/")[0]
        if folder not in used and f"{url}/{name}" not in known:
            by_folder[_relative(folder, url)].append(legible(name.rpartition("/")[2]))
    return tuple(
        FilesFinding(folder, len(names), tuple(names[:_EXAMPLES]))
        for folder, names in sorted(by_folder.items())
    )


def _masks(found: Measured) -> MasksFinding | None:
    if found.decision is None:
        return None
    values, others = describe_values(found.masks, found.reading, found.areas)
    certain = found.decision.reading
    return MasksFinding(
        number=found.masks.num_files,
        file_kinds=dict(sorted(found.mask_kinds.items(), key=lambda each: -each[1])),
        values=values,
        others=others,
        encoding=None if certain is None else certain.encoding,
        classes=None if certain is None else certain.classes,
        ignore=None if certain is None else certain.ignore,
        evidence=found.decision.evidence,
    )


def _certain_options(found: Measured, size: SizeFinding | None) -> dict[str, Any]:
    """Returns the options of `prep` that follow from the findings without a question."""
    options = dict(found.layout.given)
    if found.decision is not None and found.decision.reading is not None:
        options |= found.decision.reading.options
    return options | dict({} if size is None else size.options)


def _output_name(url: str) -> str:
    """Returns a folder for the dataset, outside of the source."""
    name = f"dataset-{os.path.basename(url)}"
    return name if not is_subpath(open_store(name), open_store(url)) else f"../{name}"


def has_groups(found: Measured) -> bool:
    """Returns whether the user gave a rule for groups."""
    return any(found.layout.given.get(name) is not None for name in GROUP_OPTIONS)


def _choices(
    found: Measured,
    groups: Sequence[GroupCandidate],
    layout: LayoutFinding,
    bad: Sequence[FilesFinding],
    duplicates: DuplicatesFinding | None,
) -> list[Choice]:
    """Returns what only the user can decide."""
    decision = found.decision
    black, meaning = None, None
    if decision is not None and decision.reading is None:
        meaning = meaning_choice(decision)
    elif decision is not None and decision.reading and not _names_background(found):
        white = found.regions.classes.get(1, ClassRegions()).num_pixels
        black = black_choice(decision.reading, white / max(1, found.regions.num_pixels))
    refused = [each for each in found.regions.bad if each.colors]
    areas, is_open = None, decision is not None and decision.reading is None
    if decision is not None and decision.reading is not None:
        is_all = len(refused) >= len(found.items)
        areas = area_choice(decision.reading, found.areas, len(refused), is_all)
    possible = (
        layout_choice(found.layout.readings),
        meaning,
        black,
        areas,
        None if has_groups(found) else group_choice(groups),
        valid_choice({each.split for each in layout.folders}),
        bad_choice(
            sum(each.number for each in (*layout.left_over, *bad))
            - len(refused) * (areas is not None or is_open),
            0
            if found.layout.given.get("background") == NO_BACKGROUND
            else sum(each.number for each in layout.left_over if each.about.startswith(NO_MASK)),
        ),
        leak_choice(0 if duplicates is None else duplicates.num_across_splits),
    )
    return [choice for choice in possible if choice is not None]
