"""Writes the notes of a plan: what the dataset or the machine makes worse, and what to do."""

from collections.abc import Iterator
from typing import Any

from flexunet.settings import flag_of
from flexunet.text import pluralize
from job.planning.facts import DatasetFacts
from job.planning.situation import GIB, Situation

_LARGEST_WHOLE = 1024  # pixels; larger images are better cut into tiles
_SIZE_OPTIONS = ("image_size", "image_height", "image_width", "tile", "tile_overlap")
_STEP = 64  # pixels; a multiple of it allows 7 levels
_LONG_MINUTES = 90


def notes_on(situation: Situation) -> Iterator[str]:
    """Yields the notes of a plan."""
    facts = situation.facts
    if facts.num_lost:
        yield (
            f"Images of {facts.width}x{facts.height} pixels lose {facts.num_lost} of "
            f"{pluralize(facts.num_regions, 'mask region')}"
            f"{_emptied(facts)}. Training cannot learn them. Prepare the dataset larger: "
            f"{larger_command(facts)}"
        )
    if situation.value("model.num_layers") < 3 and min(facts.height, facts.width) >= 32:
        side = max(_STEP, round(max(facts.height, facts.width) / _STEP) * _STEP)
        yield (
            f"Sides of {facts.width}x{facts.height} pixels can hardly be halved, so the network "
            f"sees little context. Prepare the dataset again: "
            f"{prep_command(facts, image_size=side)}"
        )
    if situation.training_bytes(1) > situation.memory_bytes:
        yield (
            f"Even one sample at a time needs about {situation.training_bytes(1) / GIB:.1f} GiB of "
            f"the {situation.machine.memory_bytes / GIB:.1f} GiB here. Prepare smaller images or "
            "tiles."
        )
    minutes = situation.num_steps * situation.step_seconds() / 60
    if minutes > _LONG_MINUTES:
        yield (
            f"Training takes about {minutes:.0f} minutes on this machine. A smaller image size, "
            "a GPU or fewer --epochs makes it shorter."
        )


def _emptied(facts: DatasetFacts) -> str:
    if not facts.num_emptied:
        return ""
    return f", and {pluralize(facts.num_emptied, 'image')} lost all foreground"


def larger_command(facts: DatasetFacts) -> str:
    """Returns the `prep` command for a dataset that loses fewer regions."""
    if facts.source_side <= _LARGEST_WHOLE:
        return prep_command(facts, image_size=-(-facts.source_side // _STEP) * _STEP)
    return prep_command(facts, tile=512, tile_overlap=64)


def prep_command(facts: DatasetFacts, **changes: Any) -> str:
    """Returns a `prep` command with the options of the dataset, of other sizes."""
    left_out = (*_SIZE_OPTIONS, "geometry") if "tile" in changes else _SIZE_OPTIONS
    kept = {name: value for name, value in facts.prep_options.items() if name not in left_out}
    words = []
    for name, value in {**kept, **changes}.items():
        flag = flag_of([name])
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif value is not None:
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            words.append(f"{flag} {_quoted(text)}")
    return f"flexunet prep SOURCE DATASET {' '.join(words)}"


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
