from typing import Any, Literal

import pytest
from pydantic import ValidationError, model_validator

from flexunet.errors import UsageError
from flexunet.paths import expand_home
from flexunet.settings import (
    Settings,
    deep_merge,
    fields_of,
    option,
    parse_settings,
    read_yaml,
    suggestion,
    write_yaml,
)


class Inner(Settings):
    """A group."""

    num_layers: int = option(3, "Layers.", ge=1)
    kernels: tuple[int, int] = option((9, 9), "Kernel, pixels.")


class Outer(Settings):
    """Two levels."""

    epochs: int = option(10, "Epochs.", not_identity=True, ge=1)
    rate: float = option(0.1, "Rate.")
    is_on: bool = option(True, "On.")
    name: str | None = option(None, "Name.")
    inner: Inner = Inner()


def outer(text: str) -> Outer:
    return parse_settings(Outer, read_yaml(text, "a.yaml"), "a.yaml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Outer().epochs = 3


def test_validated_fills_in_defaults_and_converts() -> None:
    # YAML 1.1 reads 1e-4 as text, because it has no dot.
    config = outer("rate: 1e-4\ninner: {kernels: [3, 5]}")
    assert config == Outer(rate=0.0001, inner=Inner(kernels=(3, 5)))
    assert config.inner.num_layers == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"a\.yaml: unknown key 'epoch'; did you mean 'epochs'\?"),
        (
            "inner: {num_layer: 3}",
            r"unknown key 'inner\.num_layer'; did you mean 'num_layers'\?",
        ),
        ("inner: {kernels: [9]}", r"inner\.kernels\.1=\[9\]: too few values"),
        ("inner: {kernels: []}", r"inner\.kernels\.0=\[\]: too few values"),
        ("num_layers: 3", r"unknown key 'num_layers'; did you mean 'inner\.num_layers'\?"),
        ("xyzzy: 3", "unknown key 'xyzzy'; known: epochs, inner, is_on, name, rate"),
        ("inner: {kernels: [1, 2, 3]}", r"inner\.kernels=\[1, 2, 3\]: tuple should have at most 2"),
        ("inner: {kernels: [1, a]}", r"inner\.kernels\.1='a': input should be a valid integer"),
        ("epochs: 0", r"epochs=0: input should be greater than or equal to 1"),
        ("epochs: 2.5", "epochs=2.5: .*fractional part"),
        ("epochs: yes", "epochs=True: true and false are not allowed here"),
        ("is_on: 3", "is_on=3: input should be a valid boolean"),
        ("rate: .nan", "rate=nan: input should be a finite number"),
        ("rate: .inf", "rate=inf: input should be a finite number"),
        ("rate:", "rate=None: input should be a valid number"),
        ("inner:", "inner: expected a group of keys, got None"),
        ("inner: 3", "inner: expected a group of keys, got 3"),
        ("1: 2", "keys should be strings"),
        ("epochs: 0\nrate: x", "epochs=0: .*; rate='x': "),
    ],
)
def test_mistakes_are_named_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        outer(text)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith("a.yaml: ")


@pytest.mark.parametrize(
    "text",
    [
        f"name: [{'x, ' * 5000}]",
        f"epochs: {'9' * 5000}x",
        f"inner: [[{'[1, 2, 3, 4, 5, 6, 7, 8, 9], ' * 5000}]]",
        f"{'x' * 1000}: 1",
        "".join(f"key-{i}: 1\n" for i in range(5000)),
    ],
)
def test_a_mistake_does_not_show_the_whole_file(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        outer(text)
    assert len(str(caught.value)) < 1000


def test_a_required_field_that_is_missing_is_named() -> None:
    class Strict(Settings):
        data: str = option(..., "Data.")

    with pytest.raises(UsageError, match="options: data is required"):
        parse_settings(Strict, {}, "options")
    with pytest.raises(UsageError, match="options: --data is required"):
        parse_settings(Strict, {}, "options", typed={})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"inner": {"num_layers": 0}}, r"--inner\.num-layers=0: input should be"),
        ({"inner": {"kernels": [1, "a"]}}, r"--inner\.kernels='a': input should be"),
        ({"is_on": 3}, "--is-on=3: input should be"),
        ({"epochs": 3}, r": rate='x': input should be"),
    ],
)
def test_what_was_typed_is_named_as_an_option(typed: dict[str, Any], message: str) -> None:
    is_of_file = "epochs" in typed
    values = {"rate": "x"} if is_of_file else {}
    where = "my.yaml" if is_of_file else "options"
    with pytest.raises(UsageError, match=message) as caught:
        parse_settings(Outer, deep_merge(values, typed), "my.yaml", typed=typed)
    assert str(caught.value).startswith(f"{where}: ")


def test_fields_that_do_not_fit_are_named_as_they_were_given() -> None:
    class Pair(Settings):
        """Two that belong together."""

        batch_size: int = 1
        parts: int = 1

        @model_validator(mode="after")
        def _fits(self) -> "Pair":
            raise ValueError(f"parts={self.parts} does not divide batch_size={self.batch_size}")

    with pytest.raises(UsageError, match="options: parts=2 does not divide --batch-size=3"):
        parse_settings(Pair, {"batch_size": 3, "parts": 2}, "options", typed={"batch_size": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nepochs: 4", "'epochs' is given twice; keep one"),
        ("inner: {num_layers: 3, num_layers: 4}", "'num_layers' is given twice"),
        ("name: !!python/object/apply:os.system ['touch EXECUTED']", "tag.*os.system"),
        ("name: !!python/name:os.system", "constructor for the tag"),
        ("name: !mine 3", "constructor for the tag"),
        ("a: [", "not valid YAML"),
        ("a: &x 1\nb: *x", r"not valid YAML: alias \*x is not supported; write the value out"),
        ("a: &x {c: 1}\nb: {<<: *x}", r"alias \*x is not supported"),
        ("? [1]\n: 2", "unhashable key"),
        ("[" * 1000, "not valid YAML"),
        ("- 1\n- 2", "expected `key: value` lines, got list"),
        ("just text", "expected `key: value` lines, got str"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_plain_mapping_is_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        read_yaml(text, "a.yaml")
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n"])
def test_an_empty_file_gives_no_values(text: str) -> None:
    assert read_yaml(text, "a.yaml") == {}


def test_what_is_written_is_read_as_equal_settings() -> None:
    config = Outer(rate=1e-7, name="Brüste: #1", is_on=False, inner=Inner(kernels=(5, 7)))
    text = write_yaml(config)
    assert outer(text) == config
    # Every field, the ones with defaults too, in the order of the class.
    assert [line.split(":")[0] for line in text.splitlines() if line[0].isalpha()] == [
        "epochs",
        "rate",
        "is_on",
        "name",
        "inner",
    ]


def test_fields_of_yields_every_leaf_by_path() -> None:
    assert [path for path, _ in fields_of(Outer)] == [
        ("epochs",),
        ("rate",),
        ("is_on",),
        ("name",),
        ("inner", "num_layers"),
        ("inner", "kernels"),
    ]


def test_merged_lays_groups_over_each_other() -> None:
    base = {"epochs": 1, "inner": {"num_layers": 2, "kernels": [3, 3]}}
    over = {"rate": 0.5, "inner": {"num_layers": 4}}
    assert deep_merge(base, over) == {
        "epochs": 1,
        "rate": 0.5,
        "inner": {"num_layers": 4, "kernels": [3, 3]},
    }
    assert base["inner"] == {"num_layers": 2, "kernels": [3, 3]}


def test_suggestion_names_the_nearest_or_all() -> None:
    assert suggestion("epoch", ["epochs", "rate"]) == "did you mean 'epochs'?"
    assert suggestion("xyzzy", ["rate", "epochs"]) == "known: epochs, rate"


class Places(Settings):
    """Paths."""

    one: str | None = option(None, "One.", path=True)
    more: tuple[str, ...] = option((), "More.", path=True)
    text: str = option("~", "No path.")


def test_the_home_folder_of_a_path_is_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values = {"one": "~/a", "more": ["~", "b/~", "gs://b/~"], "text": "~/a"}
    found = parse_settings(Places, values, "a.yaml")
    assert found == Places(one="/home/me/a", more=("/home/me", "b/~", "gs://b/~"), text="~/a")
    assert expand_home("./~") == "./~"
    with pytest.raises(UsageError, match=r"a\.yaml: one='~nobody-here/x': .*no home folder"):
        parse_settings(Places, {"one": "~nobody-here/x"}, "a.yaml")


class Listed(Settings):
    kinds: tuple[Literal["a", "b"], ...] = option(("a",), "Kinds.", min_length=1)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["c"], "options: --kinds='c': input should be 'a' or 'b'"),
        ([], "options: --kinds=[]: tuple should have at least 1 item after validation, not 0"),
    ],
)
def test_a_wrong_item_is_not_reported_as_a_short_list_too(kinds: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_settings(Listed, {"kinds": kinds}, "options", typed={"kinds": kinds})
    assert str(caught.value) == message
