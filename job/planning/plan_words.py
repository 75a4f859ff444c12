"""Writes a plan for people: one line for the log, and a table."""

from flexunet.text import pluralize
from job.planning.plan_file import Plan, Value
from job.planning.situation import GIB

COLUMNS = ("choice", "value", "reason", "option that overrides")


def plan_words(plan: Plan) -> str:
    """Returns the main choices in one line."""
    values = {each.option: each.value for each in plan.choices}
    levels, filters = values["model.num_layers"], values["model.base_filters"]
    parts = values["accumulate"]
    batch = f"batch {values['global_batch_size']}"
    if parts != 1:
        batch += f" in {parts} parts"
    epochs = values["epochs"]
    length = "" if epochs is None else f"{epochs} epochs, "
    return (
        f"plan: {levels} levels, {filters} filters, {batch}, {length}"
        f"{pluralize(plan.num_steps, 'step')} (about {minutes_words(plan)}); all choices are in "
        "plan.json and in the report"
    )


def minutes_words(plan: Plan) -> str:
    """Returns the duration of training, measured or estimated."""
    minutes = max(1, round(plan.minutes))
    if minutes < 120:
        return pluralize(minutes, "minute")
    return f"{minutes / 60:.0f} hours"


def plan_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Returns a row for each choice: name, value, reason, option; see `COLUMNS`."""
    return [
        (name_of(each.option), value_words(each.value), each.reason, each.flag)
        for each in plan.choices
    ]


def summary_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns rows on dataset, machine, memory and duration."""
    facts, machine = plan.dataset, plan.machine
    memory = f"about {plan.memory_bytes / GIB:.1f}"
    source = "estimated"
    if plan.measured is not None:
        memory, source = f"{plan.measured.memory_bytes / GIB:.1f}", "measured by a dry step"
    return [
        (
            "dataset",
            f"{facts.num_train} train and {facts.num_valid} valid samples of "
            f"{facts.width}x{facts.height} pixels; classes: {', '.join(facts.classes)}",
        ),
        (
            "machine",
            f"{machine.host}: {machine.device.upper()}, {machine.cores:g} cores, "
            f"{machine.precision}",
        ),
        ("memory", f"{memory} of {machine.memory_bytes / GIB:.1f} GiB, {source}"),
        ("duration", f"{pluralize(plan.num_steps, 'step')}, about {minutes_words(plan)}, {source}"),
    ]


def name_of(option: str) -> str:
    """Returns an option's path as words."""
    return option.replace(".", ": ").replace("_", " ")


def value_words(value: Value) -> str:
    """Returns a value as the command line shows it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(value_words(each) for each in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
