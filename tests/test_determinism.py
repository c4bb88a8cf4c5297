"""Same machine, same threads, same bits: a short training run of chapter 13, twice, in processes of their own."""

import subprocess
import sys

RUN = """
import torch
from effnb.lab.measure import data, seed, train
from effnb.models import SmallCNN
from effnb.optim import AvaGrad

torch.set_num_threads(1)
seed.seed_everything(3)
streams = seed.streams(3, "init", "batches")
digits = data.load("digits")
net = SmallCNN(widths=(4, 8), generator=streams["init"])
optimizer = AvaGrad(net.parameters())
train.fit(net, digits.x_train, digits.y_train, optimizer=optimizer, epochs=1, generator=streams["batches"])
print(seed.state_hash(net), seed.state_hash(optimizer.state_dict()["state"][0]))
"""


def test_two_runs_end_in_the_same_bits():
    first, second = (
        subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second and len(first.split()) == 2
