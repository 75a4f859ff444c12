"""Reads the INI files of the reference implementation and its family of projects.

Owns the meaning of their keys: what each becomes here, and why a key has no effect. Values are
literals and are never run. Must not know TensorFlow; it builds plain values, which the settings
classes check.
"""

import ast
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_prep.sources.pairs import Source
from flexunet.errors import UsageError
from flexunet.paths import expanded
from flexunet.settings import suggestion, validated

if TYPE_CHECKING:
    from rich.table import Table

logger = logging.getLogger(__name__)

Convert = Callable[[Any], Any]
Status = Literal["unknown", "not used", "mapped", "default"]

_MAX_FILE_BYTES = 1_000_000
_MAX_VALUE_CHARS = 4096
_SHOWN_CHARS = 60
_HEADER = re.compile(r"\s*\[\s*([A-Za-z_]\w*)\s*\]\s*")
_KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*[=:](.*)", re.DOTALL)

# Class names of the family that are registered here. Source: reference configuration, model.model.
_MODEL_NAMES = {"TensorFlowFlexUNet": "flexunet"}
_LOSS_NAMES = {
    "categorical_crossentropy": "categorical_crossentropy",
    "dice_loss": "dice",
    "bce_dice_loss": "bce_dice",
    "iou_loss": "iou",
    "bce_iou_loss": "bce_iou",
    "basnet_hybrid_loss": "basnet_hybrid",
    "dice_loss_multiclass": "dice_multiclass",
}
_METRIC_NAMES = ("dice_coef_multiclass", "dice_coef", "iou_coef", "sensitivity", "specificity")

_RUN_FOLDER = "results lie in the run's own folder, which is never deleted"
_NO_EFFECT = "has no effect in the reference implementation either"
_NEAREST = "a mask pixel takes the class of the nearest colour"
_AFTER_EPOCHS = "after an epoch pictures are predicted as for training; see infer.images_dir"
_UNUSED = {
    ("model", "dropout_seed_fixing"): "dropout is always repeatable: it depends on the seed",
    ("model", "show_summary"): "the layers are not printed",
    ("dataset", "class_name"): "masks are recognised by their content",
    ("dataset", "datasetclass"): "masks are recognised by their content",
    ("dataset", "resize_interpolation"): "images are stretched bilinearly, masks by nearest pixel",
    ("train", "steps_per_epoch"): "an epoch is every training sample once",
    ("train", "validation_steps"): "validation is every validation sample once",
    ("train", "model_dir"): _RUN_FOLDER,
    ("train", "eval_dir"): _RUN_FOLDER,
    ("train", "epoch_change_infer_dir"): _RUN_FOLDER,
    ("train", "epoch_change_tiled_infer"): _AFTER_EPOCHS,
    ("train", "epoch_change_tiled_infer_dir"): _AFTER_EPOCHS,
    ("train", "epoch_change_tiledinfer"): _AFTER_EPOCHS,
    ("train", "epoch_change_tiledinfer_dir"): _AFTER_EPOCHS,
    ("train", "save_weights_only"): _NO_EFFECT,
    ("train", "create_backup"): _NO_EFFECT,
    (
        "eval",
        "batch_size",
    ): "evaluation uses the batch size of training; results do not depend on it",
    ("infer", "output_dir"): "give the folder to `flexunet infer RUN IMAGES OUTPUT`",
    ("tiledinfer", "output_dir"): "give it to `flexunet infer RUN IMAGES OUTPUT --window sliding`",
    ("image", "color_order"): "pictures are always read as RGB",
    ("mask", "mask_file_format"): "masks are found by stem and recognised by their content",
    ("mask", "mask_datatype"): "masks are recognised by their content",
    ("mask", "binarize"): _NEAREST,
    ("mask", "threshold"): _NEAREST,
    ("mask", "blur"): _NEAREST,
    ("mask", "blur_size"): _NEAREST,
    ("generator", "debug"): _NO_EFFECT,
    ("generator", "verbose"): _NO_EFFECT,
    ("deformation", "alpha"): "alpah is what takes effect",
    ("deformation", "sigmoid"): "sigmoids is what takes effect",
    ("distortion", "gaussian_filter_sigma"): "the field is smoothed by gaussian_filter_rsigma",
}


@dataclass(frozen=True)
class KeyNote:
    """What became of one key of the file, or of one that is missing from it.

    Attributes:
        key: "section.key".
        value: the text in the file, or the reference implementation's default.
        status: "mapped", "not used", "unknown" (misspelt), or "default" (missing from the file).
        detail: our setting, the reason, or a suggestion.
        line: line in the file, from 1; 0 where the key is missing.
    """

    key: str
    value: str
    status: Status
    detail: str
    line: int


@dataclass(frozen=True)
class ReferenceConfig:
    """What a file of the reference implementation asks for.

    Attributes:
        train: nested values for TrainConfig.
        prep: values for PrepConfig.
        sources: image and mask folders of the splits, absolute or as URLs; empty where the file
            names none.
        infer_images: folder of images to predict, or None.
        notes: one per key of the file, in its order, then the defaults that were filled in.
    """

    train: dict[str, Any]
    prep: dict[str, Any]
    sources: tuple[Source, ...]
    infer_images: str | None
    notes: tuple[KeyNote, ...]


def is_reference_config(path: str) -> bool:
    """Returns whether `path` is named like the reference implementation's files."""
    return path.lower().endswith((".config", ".ini"))


def read_reference_config(path: str) -> ReferenceConfig:
    """Returns the settings of the INI file at `path`; nothing in it is executed.

    A missing key has the reference implementation's default, not ours.

    Raises:
        UsageError: the file cannot be read, a value is not a literal of the right kind, a key is
            given twice, or the model is not registered; the message names file, line and key.
    """
    reader = _Reader(path, _parse(_read_text(path), path))
    _read_model(reader)
    _read_training(reader)
    _read_metrics(reader)
    _read_masks(reader)
    _read_augmentation(reader)
    sources = tuple(
        source for split in ("train", "valid", "test") if (source := _source(reader, split))
    )
    infer_images = _read_inference(reader)
    prep = reader.settings.pop("prep")
    return ReferenceConfig(reader.settings, prep, sources, infer_images, reader.all_notes())


def prepare_sources(
    reference: ReferenceConfig, output_url: str, path: str, options: Mapping[str, bool]
) -> None:
    """Makes the image folders of the file at `path` a dataset, or finds it finished.

    Args:
        options: values for PrepConfig that the file cannot hold.

    Raises:
        UsageError: the file names no image folders, or a folder is missing or empty.
        ContentError: pictures are bad or splits leak.
    """
    from data_prep.pipeline import PrepConfig, prepare

    if "train" not in {source.split for source in reference.sources}:
        raise UsageError(
            f"{path}: no dataset: [train] names no images_dir and masks_dir; "
            "add them, or give --data DATASET, a folder or gs:// URL made by prep"
        )
    config = validated(PrepConfig, {**reference.prep, **options}, path)
    logger.info("preparing the images of %s in %s", path, output_url)
    prepare(reference.sources, output_url, config, has_options=False)


def format_notes(notes: Sequence[KeyNote]) -> "Table":
    """Returns a table of `notes`, what needs attention first; at most 100 columns wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Reference configuration",
        title_justify="left",
    )
    table.add_column("key", overflow="fold", min_width=24, max_width=28)
    table.add_column("value", overflow="ellipsis", no_wrap=True, max_width=14)
    table.add_column("", width=8)
    table.add_column("here", overflow="fold", max_width=40)
    styles = {"unknown": "red", "not used": "yellow", "mapped": "green", "default": "dim"}
    for note in sorted(notes, key=lambda each: list(styles).index(each.status)):
        cells = (note.key, _clipped(note.value), note.status, note.detail)
        # Text, not str: a value such as [0.8] would be read as markup.
        table.add_row(*(Text(cell) for cell in cells), style=styles[note.status])
    return table


class _Entry(NamedTuple):
    section: str
    key: str
    text: str
    line: int


@dataclass
class _Reader:
    """Hands out the entries of a file one by one and notes what became of each."""

    path: str
    entries: Mapping[tuple[str, str], _Entry]
    settings: dict[str, Any] = field(default_factory=lambda: {"prep": {}})
    # Set while reading keys that are without effect because of another one.
    unused_because: str | None = None
    _notes: dict[tuple[str, str], KeyNote] = field(default_factory=dict)
    _known: set[tuple[str, str]] = field(default_factory=set)

    def has(self, section: str, key: str) -> bool:
        return (section, key) in self.entries

    def first_of(self, section: str, keys: Sequence[str]) -> str:
        """Returns the first of `keys` that the file has, or the first where it has none."""
        return next((key for key in keys if self.has(section, key)), keys[0])

    @contextmanager
    def without_effect(self, applies: bool, reason: str) -> Iterator[None]:
        """Notes the keys taken inside as not used for `reason`, where that `applies`."""
        outer = self.unused_because
        if applies and outer is None:
            self.unused_because = reason
        yield
        self.unused_because = outer

    def take(
        self,
        section: str,
        key: str,
        convert: Convert,
        default: Any,
        target: str | None = None,
    ) -> Any:
        """Returns the converted value of a key and sets our setting `target` to it.

        Args:
            default: the reference implementation's literal for a missing key; `...`: required.
            target: dotted path of our setting; None: the caller uses the value.
        """
        self._known.add((section, key))
        entry = self.entries.get((section, key))
        if entry is None and default is ...:
            raise UsageError(f"{self.path}: {section}.{key} is required and missing; add it")
        literal = default if entry is None else self.literal(entry)
        try:
            value = convert(literal)
        except ValueError as error:
            raise self.error(entry, str(error)) from error
        if target is not None and self.unused_because is None:
            self.set(target, value)
        self._note(section, key, entry, default, f"{target} = {_shown(value)}" if target else "")
        return value

    def set(self, target: str, value: Any) -> None:
        """Sets our setting at the dotted path `target`."""
        *groups, leaf = target.split(".")
        place = self.settings
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value

    def describe(self, section: str, key: str, detail: str, status: Status = "mapped") -> None:
        """Says what became of a key that was taken without a target."""
        note = self._notes.get((section, key))
        if note is not None and self.unused_because is None:
            kept = note.status if note.status == "default" else status
            self._notes[section, key] = KeyNote(note.key, note.value, kept, detail, note.line)

    def literal(self, entry: _Entry) -> Any:
        """Returns the value of `entry` as a Python literal; raises UsageError."""
        if len(entry.text) > _MAX_VALUE_CHARS:
            raise self.error(entry, f"longer than {_MAX_VALUE_CHARS} characters; shorten it")
        if "\ufffd" in entry.text:
            raise self.error(entry, "not UTF-8; save the file as UTF-8")
        try:
            with warnings.catch_warnings():
                # The compiler warns of what literal_eval then refuses.
                warnings.simplefilter("ignore")
                tree = ast.parse(entry.text.strip(), mode="eval")
            value = ast.literal_eval(tree)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise self.error(
                entry, "not a literal (number, 'text', True, False, None, tuple, list, dict)"
            ) from error
        if isinstance(tree.body, ast.Dict) and len(tree.body.keys) != len(value):
            raise self.error(entry, "a key of the dict is given twice; keep one")
        return value

    def error(self, entry: _Entry | None, problem: str) -> UsageError:
        """Returns the error for `entry`: file, line, key, value and `problem`."""
        if entry is None:
            return UsageError(f"{self.path}: {problem}")
        where = f"{self.path}: line {entry.line}: {entry.section}.{entry.key}"
        return UsageError(f"{where} = {_clipped(entry.text.strip())}: {problem}")

    def all_notes(self) -> tuple[KeyNote, ...]:
        """Returns a note for every key: of the file in its order, then the filled-in defaults."""
        for place, entry in self.entries.items():
            if place not in self._notes:
                self.literal(entry)
                self._notes[place] = self._leftover(entry)
        notes = self._notes.values()
        return tuple(sorted(notes, key=lambda note: (note.line == 0, note.line)))

    def _note(
        self, section: str, key: str, entry: _Entry | None, default: Any, detail: str
    ) -> None:
        name, place = f"{section}.{key}", (section, key)
        if entry is None:
            if self.unused_because is None and default is not None:
                self._notes[place] = KeyNote(name, repr(default), "default", detail, 0)
            return
        text = entry.text.strip()
        if self.unused_because is not None:
            detail = self.unused_because
        status: Status = "mapped" if self.unused_because is None else "not used"
        self._notes[place] = KeyNote(name, text, status, detail, entry.line)

    def _leftover(self, entry: _Entry) -> KeyNote:
        name, text = f"{entry.section}.{entry.key}", entry.text.strip()
        reason = _UNUSED.get((entry.section, entry.key))
        if reason is not None:
            return KeyNote(name, text, "not used", reason, entry.line)
        return KeyNote(name, text, "unknown", self._hint(entry), entry.line)

    def _hint(self, entry: _Entry) -> str:
        known = set(_UNUSED) | self._known
        sections = sorted({section for section, _ in known})
        if entry.section not in sections:
            return f"no such section; {suggestion(entry.section, sections)}"
        elsewhere = sorted(section for section, key in known if key == entry.key)
        if elsewhere:
            return f"belongs into [{'] or ['.join(elsewhere)}]"
        return suggestion(entry.key, [key for section, key in known if section == entry.section])


def _read_model(reader: _Reader) -> None:
    reader.take("model", "model", _model_name, ..., "model.name")
    _read_image_size(reader)
    channels = reader.take("model", "image_channels", _channels, 3, "model.image_channels")
    if channels == 1:
        reader.set("prep.channels", "grey")
    num_classes = reader.take("model", "num_classes", _whole(1), ..., "model.num_classes")
    if num_classes == 1:
        only_sigmoid = _one_of({"sigmoid": "sigmoid"})
        reader.take("model", "final_activation", only_sigmoid, "sigmoid")
        reader.describe("model", "final_activation", "the only output is a sigmoid")
    else:
        reader.take("model", "final_activation", _same, None)
        reader.describe("model", "final_activation", "num_classes > 1 is a softmax", "not used")
    reader.take("model", "base_filters", _whole(1), 16, "model.base_filters")
    reader.take("model", "num_layers", _whole(1), 6, "model.num_layers")
    reader.take("model", "base_kernels", _pair, (3, 3), "model.base_kernels")
    reader.take("model", "dilation", _pair, (1, 1), "model.dilation")
    reader.take("model", "dropout_rate", _number, ..., "model.dropout_rate")
    scaling = _flag({True: "unit", False: "none"})
    reader.take("model", "input_normalize", scaling, True, "model.input_scaling")
    batch = _flag({True: "batch", False: "none"})
    reader.take("model", "normalization", batch, False, "model.normalization")
    activations = _one_of({"relu": "relu", "mish": "mish"})
    reader.take("model", "activation", activations, "relu", "model.activation")


def _read_image_size(reader: _Reader) -> None:
    width = reader.take("model", "image_width", _whole(1), 512)
    height = reader.take("model", "image_height", _whole(1), 512)
    if width == height:
        reader.set("prep.image_size", width)
        for key in ("image_width", "image_height"):
            reader.describe("model", key, f"image_size = {width}")
        return
    for key, side in (("image_width", width), ("image_height", height)):
        reader.set(f"prep.{key}", side)
        reader.describe("model", key, f"{key} = {side}")


def _read_training(reader: _Reader) -> None:
    optimizers = _one_of({"Adam": "adam", "AdamW": "adamw"})
    reader.take("model", "optimizer", optimizers, "Adam", "optimizer.name")
    reader.take("model", "learning_rate", _number, 0.0001, "optimizer.learning_rate")
    reader.take("model", "clipvalue", _optional(_number), 0.2, "optimizer.clipvalue")
    reader.take("model", "loss", _one_of(_LOSS_NAMES), "categorical_crossentropy", "loss.name")
    reader.take("train", "epochs", _whole(1), 100, "epochs")
    reader.take("train", "batch_size", _whole(1), 4, "global_batch_size")
    reader.take("train", "patience", _patience, 10, "schedule.early_stopping_patience")
    on_plateau = "schedule.reduce_on_plateau"
    reader.take("train", "learning_rate_reducer", _boolean, False, on_plateau)
    reader.take("train", "reducer_factor", _number, 0.4, "schedule.reducer_factor")
    reader.take("train", "reducer_patience", _whole(0), 4, "schedule.reducer_patience")
    reader.set("schedule.min_learning_rate", 0.0)


def _read_metrics(reader: _Reader) -> None:
    """Joins the metrics of the model with those that train_metrics.csv shows."""
    metrics = reader.take("model", "metrics", _metrics, ["dice_coef_multiclass"])
    columns = metrics
    if reader.has("train", "metrics"):
        columns = reader.take("train", "metrics", _metrics, [])
    joined = list(dict.fromkeys([*metrics, *columns]))
    reader.set("metrics", joined)
    for section in ("model", "train"):
        reader.describe(section, "metrics", f"metrics = {','.join(joined)}")


def _read_masks(reader: _Reader) -> None:
    colors = reader.take("mask", "rgb_map", _optional(_color_map), None)
    if colors is None:
        return
    num_classes = reader.settings["model"]["num_classes"]
    if len(colors) != max(num_classes, 2):
        raise reader.error(
            reader.entries["mask", "rgb_map"],
            f"{len(colors)} classes, but model.num_classes = {num_classes}; make them agree",
        )
    names = ["background", *(f"class_{index}" for index in range(1, len(colors)))]
    text = ";".join(
        f"{name}={','.join(str(part) for part in color)}"
        for name, color in zip(names, colors, strict=True)
    )
    reader.set("prep.classes", text)
    reader.describe("mask", "rgb_map", f"classes = {text}")


def _read_augmentation(reader: _Reader) -> None:
    is_on = reader.take("model", "generator", _boolean, False)
    with reader.without_effect(not is_on, "model.generator is False"):
        augments = reader.take("generator", "augmentation", _boolean, True)
        is_on = is_on and augments
        reader.describe("generator", "augmentation", f"augmentation.enabled = {_shown(is_on)}")
        with reader.without_effect(not augments, "generator.augmentation is False"):
            _read_kinds(reader)
    reader.set("augmentation.enabled", is_on)
    reader.describe("model", "generator", f"augmentation.enabled = {_shown(is_on)}")


def _read_kinds(reader: _Reader) -> None:
    for kind in _KINDS:
        is_on = reader.take("augmentor", kind.key, _boolean, kind.default)
        _set_probability(reader, kind.key, kind.target, kind.probability if is_on else 0.0)
        with reader.without_effect(not is_on, f"augmentor.{kind.key} is False"):
            for amount in kind.amounts:
                key = reader.first_of(amount.section, amount.keys)
                target = f"augmentation.{amount.target}"
                reader.take(amount.section, key, amount.convert, amount.default, target)
    for key, default, target, name in _LISTED_KINDS:
        values = reader.take("augmentor", key, _numbers, default)
        _set_probability(reader, key, name, 0.25 if values else 0.0, f" of {_shown(values)}")
        if values and reader.unused_because is None:
            reader.set(f"augmentation.{target}", values)


def _set_probability(
    reader: _Reader, key: str, name: str, probability: float, detail: str = ""
) -> None:
    target = f"augmentation.{name}_probability"
    if reader.unused_because is None:
        reader.set(target, probability)
    reader.describe("augmentor", key, f"{target} = {probability:g}{detail if probability else ''}")


def _source(reader: _Reader, split: str) -> Source | None:
    """Returns the folders of one split, or None where the file names neither."""
    folders = {}
    # The older spelling is that of the family's first projects.
    for key, older in (("images_dir", "image_datapath"), ("masks_dir", "mask_datapath")):
        name = reader.first_of(split, (key, older))
        folders[key] = reader.take(split, name, _optional(_folder(reader.path)), None)
        reader.describe(split, name, f"{split} split, prepared unless --data is given")
    images, masks = folders["images_dir"], folders["masks_dir"]
    if images is None and masks is None:
        return None
    if images is None or masks is None:
        missing = next(key for key, folder in folders.items() if folder is None)
        raise UsageError(f"{reader.path}: {split}.{missing} is missing; add it")
    return Source(images=images, masks=masks, split=split)


def _read_inference(reader: _Reader) -> str | None:
    """Returns the folder of images to predict; sets what is predicted after every epoch."""
    folder: str | None = reader.take("infer", "images_dir", _optional(_folder(reader.path)), None)
    reader.describe("infer", "images_dir", "images for `flexunet infer`")
    reader.take("tiledinfer", "overlapping", _optional(_whole(0)), None, "window_overlap")
    reader.take("tiledinfer", "images_dir", _optional(_folder(reader.path)), None)
    reader.describe("tiledinfer", "images_dir", "images for `flexunet infer --window sliding`")
    is_on = reader.take("train", "epoch_change_infer", _boolean, False)
    reader.describe("train", "epoch_change_infer", f"predictions after every epoch {_shown(is_on)}")
    with reader.without_effect(not is_on, "train.epoch_change_infer is False"):
        num_images = reader.take("train", "num_infer_images", _whole(0), 6, "prediction_images")
    reader.set("prediction_images", num_images if is_on else 0)
    if is_on and folder is not None:
        _predict_from(reader, folder)
    return folder


def _predict_from(reader: _Reader, folder: str) -> None:
    """Has the pictures of `folder` predicted after every epoch where it exists.

    The projects of the family are often handed on without it; training does not need it.
    """
    if "://" in folder or os.path.isdir(folder):
        reader.set("prediction_folder", folder)
        reader.describe("infer", "images_dir", f"prediction_folder = {folder}")
        return
    detail = f"{folder} does not exist: the first validation images are predicted instead"
    reader.describe("infer", "images_dir", detail, "not used")


def _read_text(path: str) -> str:
    """Returns the text at `path`, at most 1 MB; bytes that are not UTF-8 become U+FFFD."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; check the path") from error
    if len(data) > _MAX_FILE_BYTES:
        raise UsageError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; not a configuration file")
    # Comments are often in another encoding; a value with U+FFFD is refused where it is read.
    return data.decode("utf-8-sig", errors="replace")


def _parse(text: str, path: str) -> dict[tuple[str, str], _Entry]:
    """Returns the entries of INI `text` by (section, key), in order; comments are dropped.

    A value goes on over the next lines while a bracket of it is open.
    """
    entries: dict[tuple[str, str], _Entry] = {}
    first_lines: dict[str, int] = {}
    section, place, depth = "", ("", ""), 0
    for number, raw in enumerate(io.StringIO(text, newline=None), start=1):
        line, change = _without_comment(raw)
        if not line.strip():
            continue
        if header := _HEADER.fullmatch(line):
            section, depth = header[1], 0
            _refuse_second(first_lines, f"[{section}]", number, path)
        elif depth > 0:
            entries[place] = entries[place]._replace(text=f"{entries[place].text} {line.strip()}")
            depth += change
        elif section and (match := _KEY.fullmatch(line)):
            place, depth = (section, match[1].lower()), change
            _refuse_second(first_lines, ".".join(place), number, path)
            entries[place] = _Entry(*place, match[2].strip(), number)
        else:
            raise UsageError(
                f"{path}: line {number}: {_clipped(line.strip())}: expected [section], "
                "or key = value inside a section"
            )
    return entries


def _refuse_second(first_lines: dict[str, int], name: str, line: int, path: str) -> None:
    first = first_lines.setdefault(name, line)
    if first != line:
        raise UsageError(f"{path}: line {line}: {name} is already in line {first}; keep one")


def _without_comment(line: str) -> tuple[str, int]:
    """Returns `line` up to its comment, and how many brackets it opens more than it closes."""
    quote, depth = "", 0
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in ";#":
            return line[:index], depth
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
    return line, depth


def _clipped(text: str) -> str:
    """Returns `text` as one short line that a terminal can be trusted with."""
    safe = "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)
    return safe if len(safe) <= _SHOWN_CHARS else f"{safe[: _SHOWN_CHARS - 1]}…"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(_shown(part) for part in value)
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _same(value: Any) -> Any:
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError("expected a number")
    return float(value)


def _whole(minimum: int) -> Convert:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"expected a whole number of at least {minimum}")
        return value

    return convert


def _patience(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("expected a whole number")
    # The reference implementation stops never at zero and below.
    return max(value, 0)


def _channels(value: Any) -> int:
    if isinstance(value, bool) or value not in (1, 3):
        raise ValueError("expected 1 (grey) or 3 (RGB)")
    return int(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected True or False")
    return value


def _flag(meaning: Mapping[bool, str]) -> Convert:
    def convert(value: Any) -> str:
        return meaning[_boolean(value)]

    return convert


def _pair(value: Any) -> list[int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError("expected a pair of whole numbers, as (3,3)")
    return [_whole(1)(part) for part in value]


def _numbers(value: Any) -> list[float]:
    if not isinstance(value, tuple | list):
        raise ValueError("expected a list of numbers")
    return [_number(part) for part in value]


def _optional(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _one_of(names: Mapping[str, str]) -> Convert:
    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise ValueError(f"unknown; {suggestion(str(value), list(names))}")
        return names[value]

    return convert


def _model_name(value: Any) -> str:
    if not isinstance(value, str) or value not in _MODEL_NAMES:
        known = ", ".join(f"{name} ({ours})" for name, ours in _MODEL_NAMES.items())
        raise ValueError(f"not a registered model; registered: {known}")
    return _MODEL_NAMES[value]


def _metrics(value: Any) -> list[str]:
    """Returns metric names without their `val_` doubles."""
    if not isinstance(value, tuple | list):
        raise ValueError("expected a list of names")
    known = {name: name for name in _METRIC_NAMES}
    return [_one_of(known)(str(name).removeprefix("val_")) for name in value]


def _color_map(value: Any) -> list[tuple[int, ...]]:
    """Returns the colour of each class, by id; `{(r,g,b): id}` must name the ids 0..n-1 once."""
    if not isinstance(value, dict) or not value:
        raise ValueError("expected {(r,g,b): class, ...}")
    colors: dict[int, tuple[int, ...]] = {}
    for color, class_id in value.items():
        if not isinstance(color, tuple) or len(color) != 3:
            raise ValueError(f"expected (r,g,b), got {color!r}")
        if any(_whole(0)(part) > 255 for part in color):
            raise ValueError(f"expected 0..255, got {color!r}")
        if colors.setdefault(_whole(0)(class_id), color) != color:
            raise ValueError(f"class {class_id} has two colours; keep one")
    if sorted(colors) != list(range(len(colors))):
        raise ValueError(f"classes must be 0..{len(colors) - 1}, got {sorted(colors)}")
    return [colors[class_id] for class_id in sorted(colors)]


def _folder(config_path: str) -> Convert:
    """Returns a converter of a folder to its path as seen from the file's own folder."""

    def convert(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError("expected a folder in quotes")
        if "\\" in value or not value.isprintable():
            raise ValueError("write folders with / and not with \\")
        if "://" in value:
            return value
        beside = os.path.dirname(os.path.abspath(config_path))
        return os.path.normpath(os.path.join(beside, expanded(value)))

    return convert


def _some_numbers(value: Any) -> list[float]:
    numbers = _numbers([value] if isinstance(value, int | float) else value)
    if not numbers:
        raise ValueError("expected one or more numbers; to switch the kind off set it to False")
    return numbers


def _centers(value: Any) -> list[float]:
    """Returns x,y,x,y... of a list of points."""
    if not isinstance(value, tuple | list) or not value:
        raise ValueError("expected a list of (x,y)")
    points = [_numbers(point) for point in value]
    if any(len(point) != 2 for point in points):
        raise ValueError("expected a list of (x,y)")
    return [number for point in points for number in point]


class _Amount(NamedTuple):
    section: str
    keys: tuple[str, ...]  # the first one that the file has counts
    convert: Convert
    default: Any
    target: str


class _Kind(NamedTuple):
    key: str
    default: bool
    target: str
    probability: float
    amounts: tuple[_Amount, ...] = ()


def _circle(section: str, name: str, amount: float) -> tuple[_Amount, ...]:
    return (
        _Amount(section, ("radius",), _number, 0.5, f"{name}_radius"),
        _Amount(section, ("amount",), _number, amount, f"{name}_amount"),
        _Amount(section, ("centers",), _centers, [(0.5, 0.5)], f"{name}_centers"),
    )


# The reference implementation adds a copy of every picture for each kind that is on; here each
# sample is changed anew in every epoch, with these probabilities.
_KINDS = (
    _Kind("hflip", True, "hflip", 0.5),
    _Kind("vflip", True, "vflip", 0.5),
    _Kind(
        "rotation",
        True,
        "rotation",
        0.5,
        (_Amount("augmentor", ("angles",), _some_numbers, [90, 180, 270], "rotation_angles"),),
    ),
    _Kind(
        "deformation",
        False,
        "deformation",
        0.25,
        (
            # The code of the reference implementation reads the misspelt key.
            _Amount("deformation", ("alpah", "alpha"), _number, 1300, "deformation_alpha"),
            _Amount(
                "deformation", ("sigmoids", "sigmoid"), _some_numbers, [8], "deformation_sigmas"
            ),
        ),
    ),
    _Kind(
        "distortion",
        False,
        "distortion",
        0.25,
        (
            _Amount("distortion", ("gaussian_filter_rsigma",), _number, 40, "distortion_sigma"),
            _Amount("distortion", ("distortions",), _some_numbers, [0.02], "distortion_sizes"),
        ),
    ),
    _Kind(
        "sharpening",
        False,
        "sharpening",
        0.25,
        (_Amount("sharpening", ("k",), _number, 1.0, "sharpening_k"),),
    ),
    _Kind(
        "brightening",
        False,
        "brightening",
        0.25,
        (
            _Amount("brightening", ("alpha",), _number, 1.2, "brightening_alpha"),
            _Amount("brightening", ("beta",), _number, 10, "brightening_beta"),
        ),
    ),
    _Kind("barrdistortion", False, "barrel", 0.25, _circle("barrdistortion", "barrel", 0.5)),
    _Kind(
        "pincdistortion", False, "pincushion", 0.25, _circle("pincdistortion", "pincushion", -0.5)
    ),
)
# Kinds that are on when their list is not empty: key, default, setting of the list, kind.
_LISTED_KINDS = (
    ("shrinks", (0.8,), "shrink_ratios", "shrink"),
    ("shears", (), "shear_factors", "shear"),
)
