"""Checks that a network fits the way in which it is trained."""

from job.config.groups import ModelConfig, OptimizerConfig


def check_statistics(model: ModelConfig, *, accumulate: int, xla: str) -> None:
    """Refuses layers that normalise over the global batch where they cannot.

    Raises:
        ValueError: names the options, and what to choose.
    """
    if not model.exchanges_statistics or (accumulate == 1 and xla != "on"):
        return
    problem, other = (
        ("does not support model.normalization=batch", "model.normalization=group")
        if model.normalization == "batch"
        else ("does not support model.encoder_batch_norm=synchronized", "frozen")
    )
    if xla == "on":
        raise ValueError(
            f"xla=on {problem}, whose layers exchange statistics between replicas; choose {other}, "
            "or xla=off"
        )
    raise ValueError(
        f"accumulate={accumulate} {problem}, which would normalise over parts of the batch; choose "
        f"{other}, or accumulate=1 and a smaller global_batch_size"
    )


def check_encoder_training(
    model: ModelConfig, optimizer: OptimizerConfig, init_from: str | None
) -> None:
    """Refuses options of an encoder without an encoder, and frozen statistics of random weights.

    Raises:
        ValueError: names the options, and what to choose.
    """
    if not model.has_encoder:
        if optimizer.encoder_learning_rate_factor != 1.0:
            raise ValueError(
                "optimizer.encoder_learning_rate_factor has no effect on "
                f"model.name={model.name}; leave it out, or choose model.name=encoder-unet"
            )
    elif model.has_fixed_statistics and not (model.pretrained_encoder or init_from):
        raise ValueError(
            "model.encoder_batch_norm=frozen: random weights have no statistics; choose "
            "synchronized, or give model.encoder_weights or init_from"
        )
