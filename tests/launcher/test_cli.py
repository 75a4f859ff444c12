import importlib.metadata
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from data_prep.config import PrepConfig
from flexunet import errors
from flexunet.cli.options import PathType, SettingsCommand
from flexunet.errors import EXIT_CODES
from flexunet.settings import Settings, fields_of
from flexunet.synonyms import _TABLE, SYNONYMS
from job.config import TrainConfig
from job.evaluation.pipeline import EvaluateConfig
from job.inference.options import InferConfig
from launcher.cli import main
from launcher.cluster.connection import passed_on
from launcher.commands.launch import COMMANDS as LAUNCH_COMMANDS
from launcher.commands.root import COMMANDS, command
from launcher.commands.status import _print_table

# Commands by name; a group is replaced by its members.
ALL = sorted({*COMMANDS, *(f"launch {name}" for name in LAUNCH_COMMANDS)} - {"launch"})
HEAVY = (
    *("tensorflow", "keras", "ray", "google.cloud", "pyarrow", "matplotlib", "cv2", "h5py"),
    "mlflow",
)
# Numeric options without a unit: shares, factors, exponents, strengths and seeds.
UNITLESS = {
    "seed",
    "random-streams",
    "off-map-limit",
    "ignore-id",
    "optimizer.learning-rate",
    "optimizer.encoder-learning-rate-factor",
    "optimizer.beta-1",
    "optimizer.beta-2",
    "optimizer.epsilon",
    "optimizer.weight-decay",
    "optimizer.clipvalue",
    "optimizer.clipnorm",
    "schedule.reducer-factor",
    "schedule.min-learning-rate",
    "augmentation.barrel-amount",
    "augmentation.brightening-alpha",
    "augmentation.pincushion-amount",
    "augmentation.sharpening-k",
}
UNITS = (
    "pixel|sample|micro-batch|epoch|minute|MB|image|picture|case|layer|level|filter|channel|output|replica|"
    "thread|process|fold|checkpoint|share|probability|side|degrees|second|GB|worker|core|failure"
)


def options_of(name: str) -> list[click.Option]:
    return [each for each in found_command(name).params if isinstance(each, click.Option)]


def found_command(name: str) -> click.Command:
    found: click.Command | None = command
    for word in name.split():
        assert isinstance(found, click.Group)
        found = found.get_command(click.Context(found), word)
    assert found is not None
    return found


@pytest.fixture
def help_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Returns a function that returns the help of a command on a terminal of a given width."""

    def text(*argv: str, width: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        assert main([*argv, "--help"]) == 0
        return capsys.readouterr().out

    return text


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_a_text_and_its_default(name: str) -> None:
    for each in options_of(name):
        assert each.help, each.name
        assert re.match(r"[^.]{3,}.*\.", each.help), each.name
        if not each.is_flag or each.secondary_opts:
            shows_default = re.search(r"\[(default:\s|required)", each.help)
            assert shows_default or each.name in ("config_file", "file", "bucket"), each.name


@pytest.mark.parametrize("name", ALL)
def test_every_quantity_has_a_unit(name: str) -> None:
    for each in options_of(name):
        if each.metavar in ("INT", "NUMBER") and each.opts[0][2:] not in UNITLESS:
            text = (each.help or "").split("[default")[0]
            assert re.search(UNITS, text, re.IGNORECASE), f"{each.opts[0]}: {text}"


@pytest.mark.parametrize("argv", [[], ["launch"], *(name.split() for name in ALL)])
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_help_fits_the_terminal(help_of: Callable[..., str], argv: list[str], width: int) -> None:
    assert max(len(line) for line in help_of(*argv, width=width).splitlines()) <= min(width, 100)


def test_help_of_train_has_a_section_for_each_group(help_of: Callable[..., str]) -> None:
    titles = [line for line in help_of("train").splitlines() if re.fullmatch(r"\S.*:", line)]
    assert titles == [
        "Options:",
        "Model options:",
        "Loss options:",
        "Optimizer options:",
        "Schedule options:",
        "Augmentation options:",
        "Preparation options:",
        "Values:",
    ]


def test_help_lists_commands_in_the_order_of_use(help_of: Callable[..., str]) -> None:
    text = help_of()
    positions = [text.index(f"\n  {name} ") for name in ("prep", "train", "evaluate", "infer")]
    assert positions == sorted(positions)


def test_help_lists_the_exit_codes_that_exist(help_of: Callable[..., str]) -> None:
    base = errors.FlexUNetError
    classes: list[type[errors.FlexUNetError]] = [base, *base.__subclasses__()]
    assert {0, *(each.exit_code for each in classes)} == set(EXIT_CODES)
    text = help_of()
    for code, meaning in EXIT_CODES.items():
        assert f"\n  {code}  {meaning}\n" in text


def test_commands_have_readable_help() -> None:
    for name in ALL:
        assert isinstance(found_command(name), SettingsCommand), name


# Runs `--help` of commands, and prints of each its exit code, the first word of its output, and the
# heavy modules that were imported until then.
PROBE = """
import contextlib, io, json, runpy, sys
for module, *rest in {commands}:
    sys.argv = [module, *rest, "--help"]
    output, code = io.StringIO(), None
    with contextlib.redirect_stdout(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    heavy = [name for name in {heavy} if name in sys.modules]
    print(json.dumps([code, output.getvalue().split(" ")[0], heavy]))
"""
MODULES = (
    *("launcher.cli", "launcher prep", "data_prep", "data_prep.phantoms"),
    *("job.train", "job.evaluate", "job.infer", "job.doctor"),
)


def test_help_imports_nothing_heavy() -> None:
    """In one process for all commands, since a start takes a second."""
    names = [*MODULES, *(f"launcher.cli {name}" for name in ALL)]
    script = PROBE.format(commands=[name.split() for name in names], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert dict(zip(names, found, strict=True)) == {name: [0, "Usage:", []] for name in names}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "flexunet: no command 'trian'; did you mean 'train'?"),
        (["--versoin"], "flexunet: no option '--versoin'; did you mean '--version'?"),
        (["train", "--num-layers", "3"], "flexunet train: no option '--num-layers'; did you mean"),
        (["prep", "--image-sizes", "3"], "did you mean '--image-size'?"),
        (["prep", "source"], "flexunet prep: Missing argument 'OUTPUT'."),
        (["evaluate", "run", "--split", "all"], "'all' is not one of 'train', 'valid', 'test'"),
        (["infer", "run", "images", "--batch-size", "0"], "--batch-size=0: "),
        (["launch", "tarin"], "flexunet launch: no command 'tarin'; did you mean 'train'?"),
        (["launch", "prep", "source"], "flexunet launch prep: Missing argument 'OUTPUT'."),
        (["doctor", "--buckets", "x"], "did you mean '--bucket'?"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# Option names of Keras, PyTorch, nnU-Net and Ultralytics that users try with `train`.
TYPED = {
    "--lr": "--optimizer.learning-rate",
    "--lr0": "--optimizer.learning-rate",
    "--learning_rate": "--optimizer.learning-rate",
    "--batch": "--global-batch-size",
    "--batch-size": "--global-batch-size",
    "--num-epochs": "--epochs",
    "--nb_epoch": "--epochs",
    "--input-size": "--image-size",
    "--imgsz": "--image-size",
    "--patch-size": "--tile",
    "--workers": "--threads",
    "--device": "CUDA_VISIBLE_DEVICES",
    "--gpus": "CUDA_VISIBLE_DEVICES",
    "--patience": "--schedule.early-stopping-patience",
    "--weights": "--init-from",
    "--pretrained-weights": "--init-from",
    "--overlap": "--window-overlap",
    "--nc": "--model.num-classes",
    "--data-dir": "--data",
    "--output-dir": "--output",
    "--save-dir": "--output",
    "--run-name": "--name",
    "--optimizer": "--optimizer.name",
    "--wd": "--optimizer.weight-decay",
    "--momentum": "--optimizer.beta-1",
    "--loss": "--loss.name",
    "--class-weights": "--loss.class-weights",
    "--arch": "--model.name",
    "--depth": "--model.num-layers",
    "--filters": "--model.base-filters",
    "--dropout": "--model.dropout-rate",
    "--batch-norm": "--model.normalization",
    "--amp": "--precision",
    "--fp16": "--precision",
    "--grad-clip": "--optimizer.clipnorm",
    "--accumulate-grad-batches": "--accumulate",
    "--random-seed": "--seed",
    "--k-folds": "--folds",
    "--lr-scheduler": "--schedule.cosine",
    "--warmup": "--schedule.warmup-epochs",
    "--val-split": "--fractions",
    "--augment": "--augmentation.enabled",
    "--resume": "run the same command again; it resumes the run",
    "--verbose": "--progress",
    "--jit-compile": "--xla",
    "--save-period": "--checkpoint-every-minutes",
}


@pytest.mark.parametrize("name", TYPED)
def test_names_of_other_programs_are_answered_with_ours(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["train", name, "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"{re.escape(TYPED[name])}(?![\w.-])", line), line


def test_no_name_of_another_program_is_listed_twice() -> None:
    names = [name for names, _ in _TABLE for name in names.split()]
    assert len(set(names)) == len(names) == len(SYNONYMS)


@pytest.mark.parametrize("name", [*ALL, "train of a file"])
def test_what_is_proposed_exists(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    is_file = name not in ALL
    words = ["train"] if is_file else name.split()
    own = options_by_flag(" ".join(words))
    arguments = found_command(" ".join(words)).params
    for other in sorted(SYNONYMS):
        if is_file:
            (tmp_path / "file.yaml").write_text(f"{other.replace('-', '_')}: 1\n")
            main([*words, "--local", "--config", str(tmp_path / "file.yaml")])
            (line,) = capsys.readouterr().err.splitlines()
            assert "did you mean '--" not in line
            line = re.sub(r"mean '(\S+)'", lambda key: f"mean '--{key[1]}'".replace("_", "-"), line)
        elif f"--{other}" in own:
            continue
        else:
            assert main([*words, f"--{other}"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
        for proposal in re.findall(r"did you mean '(.*?)'\?", line):
            is_group = is_file and any(each.startswith(f"{proposal}.") for each in own)
            assert proposal in own or is_group, line
        for argument in re.findall(r"as the argument (\w+)", line):
            assert argument in [each.human_readable_name for each in arguments], line
        for command_name, option in re.findall(r"`flexunet (\w+) (--\S+)`", line):
            assert option in {*options_by_flag(command_name), "--help"}, line


def test_every_proposal_is_made_by_some_command() -> None:
    flags = {flag for name in ALL for flag in options_by_flag(name)}
    words = {each.human_readable_name for name in ALL for each in found_command(name).params}
    for names, proposals in _TABLE:
        for each in proposals:
            assert " " in each or each in flags | words, names


def options_by_flag(name: str) -> set[str]:
    return {flag for each in options_of(name) for flag in each.opts}


# Words in an option's text that show that it takes a path.
IS_PATH = (
    r"(folder|URL)\b(?! of the| name| below SOURCE)|CSV file|More runs|earlier run"
    r"|Where the run's dataset|weight file"
)


@pytest.mark.parametrize("cls", [PrepConfig, TrainConfig, EvaluateConfig, InferConfig])
def test_every_option_that_is_a_path_takes_a_home_folder(cls: type[Settings]) -> None:
    for path, field in fields_of(cls):
        is_text = field.annotation in (str, str | None, tuple[str, ...])
        is_path = is_text and re.search(IS_PATH, field.description, re.IGNORECASE) is not None
        assert field.json_schema_extra["path"] == is_path, path


@pytest.mark.parametrize("name", ALL)
def test_every_argument_that_is_a_path_takes_a_home_folder(name: str) -> None:
    for each in found_command(name).params:
        is_argument = isinstance(each, click.Argument) and each.name not in ("job", "words")
        paths = ("--config", "--bucket", *(["--output"] if name in ("inspect", "compare") else []))
        is_file = isinstance(each, click.Option) and each.opts[0] in paths
        assert isinstance(each.type, PathType) == (is_argument or is_file), each.name


def test_home_folders_of_a_command_are_put_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data: ~/ds\noutput: ~/runs\n")
    for words, place in (
        (["train", "--local", "--config", "~/a.yaml"], "ds"),
        (["train", "--local", "--data", "~/other"], "other"),
        (["prep", "~/source", "~/out"], "source"),
        (["report", "~/run"], "run"),
        (["evaluate", "~/run"], "run"),
        (["infer", "~/run", "~/images"], "run"),
    ):
        assert main(words) in (2, 3)
        assert f"{tmp_path}/{place}" in capsys.readouterr().err
    assert main(["prep", "~nobody-here/x", "out"]) == 2
    assert "'SOURCE': ~nobody-here: this user has no home folder here" in capsys.readouterr().err


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Blocks the import of a module that is loaded early, after printing a line.
SLOW_IMPORT = """
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            print("now", flush=True)
            time.sleep(30)
sys.meta_path.insert(0, Slow())
from launcher.cli import main
sys.exit(main(["train", "--local", "--data", "/nowhere"]))
"""


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, number) for name in ("click", "job.train") for number in SIGNALS),
        ("flexunet.cli.interrupts", signal.SIGINT),  # before it, the other signals have no handler
    ],
)
def test_a_signal_while_modules_are_imported_is_one_line(name: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_IMPORT.format(name=name)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    assert error.strip() == "flexunet: interrupted; the same command continues"
    assert process.returncode == 6


# A thread that still runs, a function that runs at exit, and a module that is removed last.
SLOW_END = """
import atexit, os, sys, threading, time, types
def pause(write=os.write, sleep=time.sleep):
    write(2, b"now\\n")
    sleep(1)
def outlast():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    pause()
class Slow:
    def __del__(self, pause=pause):
        pause()
kind = sys.argv.pop(1)
if kind == "thread":
    threading.Thread(target=outlast).start()
if kind == "atexit":
    atexit.register(pause)
if kind == "module":
    slow = sys.modules["slow"] = types.ModuleType("slow")
    slow.value = Slow()
    del slow
from launcher.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("kind", "option", "code"),
    [
        ("thread", "--version", 0),
        ("atexit", "--version", 0),
        ("module", "--version", 0),
        ("module", "--nothing", 2),
    ],
)
def test_an_interrupt_after_the_command_keeps_its_exit_code(
    kind: str, option: str, code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_END, kind, option],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "now\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (code, "")


@pytest.mark.parametrize("words", [["train", "--help"], ["--version"]])
def test_a_full_stdout_is_one_line_and_exit_code_5(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 5
    problem = "cannot write to stdout (No space left on device); free some space, then try again"
    assert done.stderr == f"flexunet: {problem}\n"


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "Exit codes:" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert importlib.metadata.version("flexunet") in capsys.readouterr().out


def test_the_list_of_jobs_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    row = (
        "train-0123abcd",
        "running",
        "2026-01-01 10:00:00",
        "0:01:00",
        "",
        f"flexunet {'x' * 99}",
    )
    _print_table([row], None)
    assert capsys.readouterr().out.splitlines()[1].endswith("x" * 99)
    _print_table([row], 80)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 80
    assert lines[1].endswith("  flexunet x...")


def test_a_cluster_gets_the_addresses_of_this_process_but_no_secret(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "set")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    expected = {"MLFLOW_TRACKING_URI": "http://host:5000", "MLFLOW_EXPERIMENT_NAME": "set"}
    assert passed_on() == expected
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:canary@host:5000")
    assert passed_on(is_local=True) == {"MLFLOW_EXPERIMENT_NAME": "set"}
    assert caplog.messages == []
    assert passed_on() == {"MLFLOW_EXPERIMENT_NAME": "set"}
    (line,) = caplog.messages
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the workers" in line
    assert "canary" not in line
