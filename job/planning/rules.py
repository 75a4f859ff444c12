"""Chooses the options of a new run from its dataset and machine, by written rules.

Each rule is a pure function of a `Situation`. Rules run in the order of `RULES`; a later rule sees
the values of the earlier ones. An option that the user gives keeps its value, and the rules plan
the others around it.
"""

import math
from collections.abc import Mapping
from typing import Any

from flexunet.text import pluralize
from job.planning.advice import notes_on
from job.planning.facts import DatasetFacts, MachineFacts
from job.planning.plan_file import Choice, Plan
from job.planning.situation import GIB, Chosen, Limits, Rule, Situation

LARGEST_LEVELS = 7
SMALLEST_BOTTOM = 8  # pixels, shorter side of the deepest level
FILTERS = (32, 24, 16, 12, 8, 6, 4)
USUAL_FILTERS = 8  # fewer only if memory is short
FEW_SAMPLES = 100
PARAMETERS_OF_FEW, PARAMETERS_OF_MANY = 8_000_000, 32_000_000
BATCHES = (4, 6, 8, 12, 24, 36, 48, 72, 96)
FEWEST_STEPS, MOST_STEPS, STEPS_PER_SAMPLE = 1500, 9000, 30
SHORTEST_STEPS = 500  # of a run that would take too long
TRAINING_MINUTES = 60.0
RARE_SHARE = 0.5
WARMUP_SHARE = 0.05
EMA_SHARE, MOST_EMA = 0.05, 0.999


def make_plan(
    facts: DatasetFacts,
    machine: MachineFacts,
    given: Mapping[str, Any],
    limits: Limits | None = None,
) -> Plan:
    """Returns the plan of a run; a pure function.

    Args:
        given: the options of the user, by dotted path.
        limits: found by a dry step; None: memory is estimated.
    """
    situation = Situation(facts, machine, limits or Limits(), dict(given), frozenset(given))
    choices: list[Choice] = []
    for rule in RULES:
        for option, (value, reason) in rule.choose(situation).items():
            if option in given:
                choices.append(
                    Choice(option=option, value=given[option], reason="given", source="given")
                )
            else:
                choices.append(Choice(option=option, value=value, reason=reason))
        situation = situation.with_values({each.option: each.value for each in choices})
    num_steps = situation.num_steps
    samples = max(1, situation.replica_batch // int(situation.value("accumulate")))
    return Plan(
        dataset=facts,
        machine=machine,
        given=dict(given),
        choices=tuple(choices),
        samples_at_once=samples,
        memory_bytes=round(situation.training_bytes(samples)),
        num_steps=num_steps,
        minutes=num_steps * situation.step_seconds() / 60,
        notes=tuple(notes_on(situation)),
    )


def _network(situation: Situation) -> Chosen:
    return {
        "model.name": ("flexunet", "trains from random weights on few images"),
        "model.base_kernels": ((3, 3), "small kernels; the levels give the receptive field"),
        "model.dilation": ((1, 1), "the levels give the receptive field"),
        "model.normalization": (
            "group",
            "normalises each image alone, so that small batches and --accumulate work",
        ),
    }


def wanted_reach(facts: DatasetFacts) -> int:
    """Returns the receptive field that a network should have, in pixels."""
    half = max(facts.height, facts.width) // 2
    return max(half, round(2 * (facts.region_side or 0)))


def _levels(situation: Situation) -> Chosen:
    facts = situation.facts
    wanted = wanted_reach(facts)
    side = min(facts.height, facts.width)
    fewest, limit = situation.allowed_levels
    most = 1
    while (
        most < min(LARGEST_LEVELS, limit)
        and math.gcd(facts.height, facts.width) % 2**most == 0
        and side // 2**most >= SMALLEST_BOTTOM
    ):
        most += 1
    levels = next(
        (n for n in range(fewest, most) if situation.cost(num_layers=n).receptive_field >= wanted),
        most,
    )
    reach = situation.cost(num_layers=levels).receptive_field
    reason = f"a receptive field of {reach} pixels; {wanted} are wanted"
    if reach < wanted:
        reason += f"; sides of {facts.height} and {facts.width} allow no more"
    return {"model.num_layers": (levels, reason)}


def _batch(situation: Situation) -> Chosen:
    facts, machine = situation.facts, situation.machine
    wanted = 4 if machine.device == "cpu" else 8 if facts.num_train < FEW_SAMPLES else 12
    if facts.num_train < wanted:
        wanted = max(1, facts.num_train)
        sizes: tuple[int, ...] = (1, 2, *BATCHES)
    else:
        sizes = BATCHES
    parts = int(situation.value("accumulate")) if "accumulate" in situation.given else 1
    unit = machine.num_replicas * parts
    size = next((n for n in sizes if n >= wanted and n % unit == 0), unit * -(-wanted // unit))
    limit = situation.limits.samples_at_once
    if limit is not None and situation.model().exchanges_statistics:
        size = min(size, limit * machine.num_replicas)  # there are no micro-batches
    counts = [str(n) for n in range(1, size + 1) if size % n == 0]
    reason = f"{', '.join(counts)} workers divide it"
    return {
        "global_batch_size": (size, f"{wanted} or more on a {machine.device.upper()}; {reason}")
    }


def _filters(situation: Situation) -> Chosen:
    limit = situation.limits.base_filters or FILTERS[0]
    few = situation.facts.num_train < FEW_SAMPLES
    most_parameters = PARAMETERS_OF_FEW if few else PARAMETERS_OF_MANY
    steps, minutes = wanted_steps(situation), training_minutes(situation)
    most = min(limit, situation.limits.measured_filters or limit)
    allowed = [n for n in FILTERS if n <= most] or [FILTERS[-1]]
    reason = "as many as any rule allows"
    for filters in allowed:
        changes = {"base_filters": filters}
        next_fewer = allowed.index(filters) + 1 < len(allowed)
        if situation.training_bytes(1, **changes) > situation.memory_bytes and next_fewer:
            reason = f"more do not fit into {situation.machine.memory_bytes / GIB:.1f} GiB"
        elif filters <= USUAL_FILTERS:
            break
        elif situation.cost(**changes).num_parameters > most_parameters:
            reason = (
                f"at most {most_parameters // 10**6} million parameters for "
                f"{pluralize(situation.facts.num_train, 'training sample')}"
            )
        elif steps * situation.step_seconds(**changes) > 60 * minutes:
            reason = f"more would need over {minutes:g} minutes for {steps} steps"
        else:
            break
    if filters == situation.limits.base_filters:
        reason = "the dry step needed too much memory with more"
    cost = situation.cost(base_filters=filters)
    return {
        "model.base_filters": (filters, f"{cost.num_parameters / 1e6:.1f} M parameters; {reason}")
    }


def _accumulate(situation: Situation) -> Chosen:
    batch, limit = situation.replica_batch, situation.limits.samples_at_once
    parts = [n for n in range(1, batch + 1) if batch % n == 0]
    if situation.model().exchanges_statistics:
        return {"accumulate": (1, "batch normalisation needs the whole batch at once")}

    def fits(part: int) -> bool:
        if limit is not None:
            return batch // part <= limit
        return situation.training_bytes(batch // part) <= situation.memory_bytes

    part = next((n for n in parts if fits(n)), batch)
    bytes_used = situation.training_bytes(batch // part)
    return {
        "accumulate": (
            part,
            f"{pluralize(batch // part, 'sample')} at once: about {bytes_used / GIB:.1f} of "
            f"{situation.machine.memory_bytes / GIB:.1f} GiB",
        )
    }


def wanted_steps(situation: Situation) -> int:
    """Returns the training steps that the dataset needs; those of given epochs."""
    if situation.value("epochs") is not None and "epochs" in situation.given:
        return int(situation.value("epochs")) * situation.steps_per_epoch
    if situation.time_budget is not None:
        return SHORTEST_STEPS
    return min(max(FEWEST_STEPS, STEPS_PER_SAMPLE * situation.facts.num_train), MOST_STEPS)


def training_minutes(situation: Situation) -> float:
    """Returns the longest duration of a training."""
    return TRAINING_MINUTES if situation.time_budget is None else situation.time_budget


def _length(situation: Situation) -> Chosen:
    if situation.time_budget is not None:
        return {"epochs": (None, f"--time-budget ends it after {situation.time_budget:g} minutes")}
    steps = wanted_steps(situation)
    reason = f"about {steps} steps for {situation.facts.num_train} training samples"
    possible = int(60 * TRAINING_MINUTES / situation.step_seconds())
    if steps > max(possible, SHORTEST_STEPS):
        steps = max(possible, SHORTEST_STEPS)
        reason = f"about {steps} steps: more would take over {TRAINING_MINUTES:g} minutes"
    epochs = max(1, math.ceil(steps / situation.steps_per_epoch))
    return {"epochs": (epochs, f"{reason}; {situation.steps_per_epoch} in an epoch")}


def _precision(situation: Situation) -> Chosen:
    return {
        "precision": ("auto", f"this machine computes in {situation.machine.precision}"),
        "fit_postprocessing": (True, "uses only what is better beyond chance"),
    }


def _loss(situation: Situation) -> Chosen:
    return {
        "loss.name": (
            "ce_dice",
            "cross-entropy learns from the first step; Dice counts small regions as large ones",
        ),
        "loss.class_weights": (None, "Dice weighs the classes already"),
    }


def _foreground_share(situation: Situation) -> Chosen:
    share = situation.facts.foreground_share
    shown = f"{100 * share:.0f} % of the samples have foreground"
    is_rare = 0 < share < RARE_SHARE
    chosen = (RARE_SHARE, f"only {shown}") if is_rare else (None, shown)
    start = situation.values.get("foreground_share", chosen[0])
    end = (None, "the share does not change") if start is None else (0.0, "ends as the images are")
    return {"foreground_share": chosen, "foreground_share_end": end}


def _optimizer(situation: Situation) -> Chosen:
    window = max(1, round(EMA_SHARE * situation.num_steps))
    momentum = min(MOST_EMA, round(1 - 1 / window, 4)) or None
    return {
        "optimizer.name": ("adamw", "needs little tuning"),
        "optimizer.learning_rate": (1e-3, "the peak, after the warm-up"),
        "optimizer.clipvalue": (None, "clipnorm limits the gradient instead"),
        "optimizer.clipnorm": (1.0, "limits single large steps"),
        "optimizer.ema_momentum": (
            momentum,
            f"averages the weights of about {window} steps, {100 * EMA_SHARE:g} % of all",
        ),
    }


def _schedule(situation: Situation) -> Chosen:
    warmup = round(WARMUP_SHARE * situation.num_steps / situation.steps_per_epoch, 2)
    falls = bool(situation.value("schedule.reduce_on_plateau")) and (
        "schedule.reduce_on_plateau" in situation.given
    )
    return {
        "schedule.reduce_on_plateau": (False, "cosine decay lowers the rate instead"),
        "schedule.cosine": (not falls, "falls to 0 at the planned end"),
        "schedule.warmup_epochs": (warmup, f"{100 * WARMUP_SHARE:g} % of the epochs"),
        "schedule.early_stopping_patience": (
            0,
            "the schedule needs all its epochs; the best checkpoint is kept",
        ),
    }


def _augmentation(situation: Situation) -> Chosen:
    facts = situation.facts
    is_free = not facts.is_scene and not facts.is_oriented
    is_strong = facts.num_train < FEW_SAMPLES and not facts.is_scene
    kind = "any orientation is as likely" if is_free else "the images have an orientation"
    turned = 0.5 if is_free else 0.0
    of_samples = pluralize(facts.num_train, "training sample")
    return {
        "augmentation.preset": (
            "strong" if is_strong else "light",
            "photos of scenes keep their lines" if facts.is_scene else of_samples,
        ),
        "augmentation.enabled": (True, of_samples),
        "augmentation.hflip_probability": (
            0.0 if facts.is_oriented else 0.5,
            "prep mirrored the images to one side" if facts.is_oriented else "left is as right",
        ),
        "augmentation.vflip_probability": (turned, kind),
        "augmentation.rotation_probability": (turned, kind),
    }


RULES = (
    Rule(
        ("model.name", "model.base_kernels", "model.dilation", "model.normalization"),
        "A FlexUNet network with kernels of 3 x 3 and group normalisation.",
        _network,
    ),
    Rule(
        ("model.num_layers",),
        "The fewest levels whose receptive field reaches half of the longer image side, and twice "
        "the side of a mean region if the dataset knows it. The sides must stay divisible, and "
        f"the deepest level keeps at least {SMALLEST_BOTTOM} pixels; at most {LARGEST_LEVELS} "
        "levels.",
        _levels,
    ),
    Rule(
        ("global_batch_size",),
        f"4 on a CPU; on a GPU 8, or 12 from {FEW_SAMPLES} training samples. The next of "
        f"{', '.join(map(str, BATCHES))} that the replicas divide.",
        _batch,
    ),
    Rule(
        ("model.base_filters",),
        f"The most of {', '.join(map(str, FILTERS))} that fit into memory one sample at a time, "
        f"with at most {PARAMETERS_OF_FEW // 10**6} million parameters below {FEW_SAMPLES} "
        f"training samples, else {PARAMETERS_OF_MANY // 10**6} million, and an estimated duration "
        f"of at most {TRAINING_MINUTES:g} minutes. With --time-budget, {SHORTEST_STEPS} steps must "
        f"fit into it. Fewer than {USUAL_FILTERS} only for memory.",
        _filters,
    ),
    Rule(
        ("accumulate",),
        "The fewest micro-batches that fit into memory: estimated, then tried in a dry step.",
        _accumulate,
    ),
    Rule(
        ("epochs",),
        f"{STEPS_PER_SAMPLE} steps per training sample, {FEWEST_STEPS} to {MOST_STEPS}; fewer, but "
        f"at least {SHORTEST_STEPS}, if that takes over {TRAINING_MINUTES:g} minutes. none with "
        "--time-budget.",
        _length,
    ),
    Rule(
        ("precision", "fit_postprocessing"),
        "`auto`: the narrowest type that the hardware computes natively. After training, "
        "thresholds, smallest regions and a temperature are fitted on the validation split.",
        _precision,
    ),
    Rule(("loss.name", "loss.class_weights"), "Cross-entropy plus Dice, no class weights.", _loss),
    Rule(
        ("foreground_share", "foreground_share_end"),
        f"{RARE_SHARE:g} if fewer samples than that have foreground, falling to that of the "
        "dataset in the last epoch; else every sample once.",
        _foreground_share,
    ),
    Rule(
        (
            "optimizer.name",
            "optimizer.learning_rate",
            "optimizer.clipvalue",
            "optimizer.clipnorm",
            "optimizer.ema_momentum",
        ),
        "AdamW with a rate of 0.001, the gradient of each tensor clipped to norm 1. The weights "
        f"are averaged over about {100 * EMA_SHARE:g} % of the steps, with a momentum of at most "
        f"{MOST_EMA:g}.",
        _optimizer,
    ),
    Rule(
        (
            "schedule.reduce_on_plateau",
            "schedule.cosine",
            "schedule.warmup_epochs",
            "schedule.early_stopping_patience",
        ),
        f"Warm-up over {100 * WARMUP_SHARE:g} % of the epochs, then cosine decay; no early "
        "stopping.",
        _schedule,
    ),
    Rule(
        (
            "augmentation.preset",
            "augmentation.enabled",
            "augmentation.hflip_probability",
            "augmentation.vflip_probability",
            "augmentation.rotation_probability",
        ),
        f"The preset strong below {FEW_SAMPLES} training samples, else light. Mirrored and turned, "
        "unless `prep` gave all images one orientation. Images that look like photos of scenes "
        "(colour, 5 or more classes) are light, not turned and not upside down.",
        _augmentation,
    ),
)
