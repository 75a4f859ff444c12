"""Options of `launch train`: the cluster, the workers and the limits on restarts."""

from flexunet.settings import Settings, option
from launcher.cluster.resources import Resources


class LaunchConfig(Settings):
    """Options of `launch train`: workers and restart limits."""

    address: str | None = option(
        None, "HOST:PORT of a Ray cluster; none: RAY_ADDRESS if it is set, else a local Ray."
    )
    num_workers: int = option(1, "Worker processes that train together.", ge=1)
    gpus_per_worker: int = option(0, "GPUs per worker; 0: train on CPUs.", ge=0)
    cpus_per_worker: int | None = option(None, "CPU cores per worker; none: as many as fit.", ge=1)
    max_failures: int = option(
        3,
        "Maximum consecutive failures to recover from without a new checkpoint. Preempted nodes do "
        "not count.",
        ge=0,
    )
    max_preemptions: int | None = option(
        None,
        "Maximum preempted nodes to recover from before exiting with code 6; the same command "
        "resumes; none: any number.",
        ge=0,
    )
    wait_for_nodes: bool = option(
        False, "Wait until the cluster has enough nodes; needs --cpus-per-worker."
    )
    join_timeout: float = option(900.0, "Seconds to wait until all workers have started.", gt=0)

    @property
    def per_worker(self) -> Resources:
        """The resources of one worker."""
        return Resources(self.cpus_per_worker or 1, self.gpus_per_worker)
