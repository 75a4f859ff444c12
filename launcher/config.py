"""Options of `launch train`: which cluster, how many workers, how many restarts."""

from flexunet.settings import Settings, option
from launcher.cluster.resources import Resources


class LaunchConfig(Settings):
    """Where training runs, and how often it is started again."""

    address: str | None = option(
        None, "HOST:PORT of a Ray cluster; none: RAY_ADDRESS, else a Ray of this machine."
    )
    num_workers: int = option(1, "Workers: processes that train together.", ge=1)
    gpus_per_worker: int = option(0, "GPUs of each worker; 0: it computes on CPUs.", ge=0)
    cpus_per_worker: int | None = option(
        None, "CPU cores of each worker; none: as many as all of them can have.", ge=1
    )
    max_failures: int = option(
        3,
        "Failures in a row, with no new checkpoint between them, after which it is given up. A "
        "preempted node is not one.",
        ge=0,
    )
    max_preemptions: int | None = option(
        None,
        "Preempted nodes that are survived; one more ends it, to be resumed. None: any number.",
        ge=0,
    )
    wait_for_nodes: bool = option(
        False, "Wait for nodes that the cluster does not have yet; needs --cpus-per-worker."
    )
    join_timeout: float = option(900.0, "Seconds within which all workers must have started.", gt=0)

    @property
    def per_worker(self) -> Resources:
        """What one worker takes of one node."""
        return Resources(self.cpus_per_worker or 1, self.gpus_per_worker)
