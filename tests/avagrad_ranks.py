"""What two processes with sharded parameters compute; a module of its own, so that a spawned process can import it."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from effnb.optim import AvaGrad

OPTIONS = {
    "foreach": {"foreach": True},
    "single": {"foreach": False},
    "capturable": {"capturable": True},
    "lagged": {"norm": "lagged"},
    "joint": {"norm_scope": "all", "weight_decay": 0.1, "decoupled_weight_decay": True},
    "refuses nan": {"error_if_nonfinite": True},
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def train(model, rows, **options):
    """Five steps on ``rows`` of the same batches; returns the normalisers."""
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    optimizer, gammas = AvaGrad(groups, lr=0.1, **options), []
    for step in range(5):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x[rows]).square().mean().backward()
        optimizer.step()
        gammas += [float(group["gamma"]) for group in optimizer.param_groups]
    return gammas


def work(rank, port, found):
    """One of two processes; rank 0 leaves weights and normalisers of each set of options in ``found``."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, options in OPTIONS.items():
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        gammas = train(model, slice(rank, None, 2), **options)
        weights = [p.full_tensor().detach() for p in model.parameters()]
        if rank == 0:
            found[name] = weights, gammas
    dist.destroy_process_group()
