"""A communication hook for DistributedDataParallel."""

# No postponed annotations here: DistributedDataParallel looks at those of a hook.
import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_present(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DistributedDataParallel that leaves out the gradients of dropped branches.

    Without it DDP sends zeros in their place. Gradients, and which of them are ``None``, are the same with and without it.
    It takes it, as ``fully_shard`` does, that a gradient which is missing on one rank is missing on all of them: ranks
    agree on what they drop, but a model that leaves out parameters depending on its data cannot use it.

    Usage::

        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        ddp.register_comm_hook(None, all_reduce_present)

    Args:
        group: the process group, ``None`` for the default one; the state that ``register_comm_hook`` takes.
        bucket: DDP's; its flat buffer, of any device and floating-point type, is averaged in place where gradients exist.

    Returns:
        A future of the buffer.
    """
    buffer, size = bucket.buffer(), dist.get_world_size(group)
    runs = _present_runs(bucket, buffer)
    sent = [dist.all_reduce(run.div_(size), group=group, async_op=True).get_future() for run in runs]
    if not sent:
        nothing: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=None if buffer.device.type == "cpu" else [buffer.device]
        )
        nothing.set_result(buffer)
        return nothing

    def averaged(_: object) -> Tensor:
        for earlier in sent[:-1]:  # on a GPU this lets the present stream wait, and not the host
            earlier.wait()
        return buffer

    # Not collect_all(): what that returns belongs to no device, and may not hold a tensor of one.
    finished: torch.futures.Future[Tensor] = sent[-1].then(averaged)
    return finished


def _present_runs(bucket: dist.GradBucket, buffer: Tensor) -> list[Tensor]:
    """The stretches of the buffer that hold gradients; adjacent ones are one stretch."""
    runs: list[tuple[int, int]] = []
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        if parameter.grad is None:
            continue
        start = int(gradient.storage_offset() - buffer.storage_offset())
        end = start + gradient.numel()
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, end))
    return [buffer[start:end] for start, end in runs]
