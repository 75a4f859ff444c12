"""Maps the option names of Keras, PyTorch, nnU-Net and Ultralytics to those of this package.

The table does not depend on the commands: the caller passes the options of its command.
"""

from collections.abc import Collection

_SIZE_OF_DATASET = "set in the dataset: `flexunet prep --image-size`"
_SPLIT_OF_DATASET = "set in the dataset: `flexunet prep --fractions`"
_ALL_GPUS = "all visible GPUs are used; CUDA_VISIBLE_DEVICES selects them (empty: no GPU)"

# Names -> candidates; the first one that the command has is suggested. `--x` is an option, WORD an
# argument; an entry with blanks is advice, valid for every command.
_TABLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Optimizer and schedule
    ("lr lr0 learning-rate initial-lr base-lr init-lr", ("--optimizer.learning-rate",)),
    ("min-lr lr-min end-lr", ("--schedule.min-learning-rate",)),
    ("lr-patience plateau-patience", ("--schedule.reducer-patience",)),
    ("lr-factor factor gamma lr-decay", ("--schedule.reducer-factor",)),
    ("patience early-stopping early-stop es-patience", ("--schedule.early-stopping-patience",)),
    ("warmup warmup-epochs warm-up", ("--schedule.warmup-epochs",)),
    ("scheduler lr-scheduler lr-schedule cos-lr cosine", ("--schedule.cosine",)),
    ("optimizer optim opt", ("--optimizer.name",)),
    ("weight-decay wd decay", ("--optimizer.weight-decay",)),
    ("momentum beta1 beta-1", ("--optimizer.beta-1",)),
    ("beta2 beta-2", ("--optimizer.beta-2",)),
    ("eps epsilon adam-epsilon", ("--optimizer.epsilon",)),
    ("clip-norm clipnorm grad-clip clip-grad max-grad-norm gradient-clip-val gradient-clip "
     "clip-grad-norm", ("--optimizer.clipnorm",)),
    ("clip-value clipvalue", ("--optimizer.clipvalue",)),
    # Length of training
    ("epoch num-epochs n-epochs max-epochs nb-epoch nb-epochs", ("--epochs",)),
    ("batch batch-size bs train-batch-size per-device-train-batch-size",
     ("--global-batch-size", "--batch-size")),
    ("grad-accum grad-accum-steps accumulation-steps gradient-accumulation-steps "
     "accumulate-grad-batches accum", ("--accumulate",)),
    ("save-every save-freq save-period save-interval checkpoint-interval checkpoint-every",
     ("--checkpoint-every-minutes",)),
    ("max-to-keep save-total-limit save-top-k", ("--keep-checkpoints",)),
    # Machines
    ("workers num-workers nproc n-jobs jobs num-processes np dataloader-num-workers",
     ("--num-workers", "--threads", "--num-processes", "--memory-per-worker")),
    ("nodes nnodes num-nodes nproc-per-node", ("--num-workers",)),
    ("num-threads n-threads cpus num-cpus cores",
     ("--cpus-per-worker", "--threads", "--num-processes")),
    ("gpus gpu num-gpus n-gpus ngpus ngpu gpu-ids devices device accelerator use-gpu cuda",
     ("--gpus-per-worker", "--needs-gpu", _ALL_GPUS)),
    ("amp fp16 bf16 half mixed-precision dtype use-amp no-amp", ("--precision",)),
    ("compile jit jit-compile torch-compile", ("--xla",)),
    ("random-seed random-state manual-seed rng-seed", ("--seed",)),
    # The dataset
    ("data-dir dataset data-path dataset-dir train-dir data-root root train-data",
     ("--data", "SOURCE")),
    ("source input inputs input-dir input-folder images images-dir image-dir img-dir predict-dir",
     ("SOURCE", "IMAGES", "--data")),
    ("masks mask-dir masks-dir labels labels-dir annotations",
     ("SOURCE", "masks/ is in SOURCE, beside images/; see `flexunet prep --help`")),
    ("input-size image-size img-size imgsz input-shape size resize img-height img-width resolution",
     ("--image-size", _SIZE_OF_DATASET)),
    ("patch-size crop-size tile-size", ("--tile", "set in the dataset: `flexunet prep --tile`")),
    ("stride step-size tile-step-size window-stride",
     ("--overlap", "--window-overlap", "--tile-overlap")),
    ("overlap", ("--window-overlap", "--tile-overlap")),
    ("val-split validation-split valid-split test-size train-ratio split-ratio val-ratio val-size "
     "split val-fraction", ("--fractions", "--split", _SPLIT_OF_DATASET)),
    ("classes num-classes n-classes nc nclass num-labels", ("--model.num-classes", "--classes")),
    ("class-names names color-map colors palette",
     ("--classes", "set in the dataset: `flexunet prep --classes`")),
    ("ignore-index ignore-label",
     ("--ignore-id", "set in the dataset: `flexunet prep --ignore-id`")),
    ("k-fold k-folds kfold cv num-folds n-folds n-splits", ("--folds", "--num-folds")),
    # The network
    ("model arch architecture backbone network encoder model-name net", ("--model.name", "RUN")),
    ("model-path model-dir run-dir", ("RUN", "--init-from")),
    ("depth num-layers layers levels num-levels num-stages n-stages", ("--model.num-layers",)),
    ("filters num-filters n-filters features base-filters base-channels start-filters init-filters "
     "init-features base-features", ("--model.base-filters",)),
    ("kernel-size kernel kernels", ("--model.base-kernels",)),
    ("in-channels input-channels num-channels n-channels image-channels channels",
     ("--model.image-channels", "--channels")),
    ("dropout dropout-rate drop-rate", ("--model.dropout-rate",)),
    ("norm normalization batch-norm batchnorm norm-layer bn", ("--model.normalization",)),
    ("activation act act-layer", ("--model.activation",)),
    # Loss, metrics, augmentation
    ("loss loss-fn loss-function criterion", ("--loss.name",)),
    ("class-weights class-weight loss-weights", ("--loss.class-weights",)),
    ("metric", ("--metrics",)),
    ("augment augmentation augmentations aug data-augmentation transforms no-augment",
     ("--augmentation.enabled", "--flips")),
    ("hflip fliplr horizontal-flip", ("--augmentation.hflip-probability", "--flips")),
    ("vflip flipud vertical-flip", ("--augmentation.vflip-probability", "--flips")),
    ("rotation rotation-range degrees rotate", ("--augmentation.rotation-angles",)),
    ("shear shear-range", ("--augmentation.shear-factors",)),
    ("tta mirror mirroring test-time-augmentation", ("--flips",)),
    # Runs and their files
    ("weights pretrained pretrained-weights init-weights init-checkpoint finetune finetune-from",
     ("--init-from", "--checkpoint", "RUN")),
    ("checkpoint ckpt ckpt-path checkpoint-path chk load load-model load-weights resume-from "
     "resume-from-checkpoint", ("--checkpoint", "--init-from")),
    ("resume continue continue-training", ("run the same command again; it resumes the run",)),
    ("output-dir out out-dir output-folder save-dir log-dir logdir results results-dir save-path "
     "project work-dir output", ("--output", "OUTPUT")),
    ("run-name exp-name experiment experiment-name exp tag run-id", ("--name",)),
    ("exist-ok overwrite force", ("--overwrite", "--name")),
    ("verbose quiet silent progress-bar no-progress-bar", ("--progress",)),
    ("cfg conf config-file hyp params yaml", ("--config",)),
    ("postprocess post-processing min-area min-size",
     ("--small-regions", "--remove-small-regions")),
    ("models members", ("--ensemble",)),
)  # fmt: skip

SYNONYMS = {name: found for names, found in _TABLE for name in names.split()}


def suggest_option(
    name: str, options: Collection[str], arguments: Collection[str] = ()
) -> str | None:
    """Returns a suggestion for an option name of another program, None if the name is unknown.

    Args:
        name: the option as typed, such as `--batch_size`.
        options: the command's options, such as `--global-batch-size`.
        arguments: the command's arguments as its help shows them, such as `SOURCE`.
    """
    for each in SYNONYMS.get(name.lstrip("-").lower().replace("_", "-"), ()):
        if each in options:
            return f"did you mean {each!r}?"
        if each in arguments:
            return f"give it as the argument {each}"
        if " " in each:
            return each
    return None
