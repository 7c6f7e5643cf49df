"""A loop that can be stopped and resumed: torchrun --nproc-per-node 2 examples/resumable.py, and the same line again.

It trains a small CNN with BatchNorm on scikit-learn's digits, validates the average of all workers, and writes a small
model that runs where abtrain is not installed. A line `step ...` is printed at each checkpoint.
"""

import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import abtrain
from abtrain import checkpoint

STEPS, EVERY, BATCH = 400, 20, 32
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))  # a worker that hangs ends the others after this time
rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

digits = load_digits()
images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
train, test = torch.arange(len(labels)) % 5 > 0, torch.arange(len(labels)) % 5 == 0
mine = torch.nonzero(train).flatten()[rank::workers]  # the samples of this worker

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
    *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
ab = abtrain.ABTraining(model, optimizer, abtrain.recipes.ab_outer(STEPS, every=EVERY, warmup_steps=100))

saved = checkpoint.latest("checkpoints", ab.communicator)  # None at the first start
if saved:
    ab.load_state_dict(saved.states[0]["ab"])  # weights, BatchNorm's statistics, the optimizer, and the step
    scheduler.load_state_dict(saved.states[0]["scheduler"])

asked = torch.zeros(1)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.fill_(1))

while not ab.finished:
    draws = torch.Generator().manual_seed(1000 * ab.steps_done + rank)  # the same samples after a resume
    chosen = mine[torch.randint(len(mine), (BATCH,), generator=draws)]
    model.train()
    nn.functional.cross_entropy(ab(images[chosen]), labels[chosen]).backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    ab.step()
    if ab.steps_done % EVERY == 0 and not ab.finished:  # at a merge: workers wait for each other anyway
        stop = asked.clone()
        if dist.is_initialized():
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)  # all workers stop at the same step
        if stop or ab.steps_done % 100 == 0:
            state = {"ab": ab.state_dict(), "scheduler": scheduler.state_dict()}
            checkpoint.save("checkpoints", ab.steps_done, state, ab.communicator)  # on all workers
            if rank == 0:
                print(f"step {ab.steps_done} is saved", flush=True)
        if stop:
            raise SystemExit(75)  # "stopped, run again"

with ab.merged() as average, torch.no_grad():
    average.eval()
    accuracy = (average(images[test]).argmax(1) == labels[test]).float().mean().item()
    if rank == 0:
        small = abtrain.to_plain(average)
        two = images[:2].clone()  # the file holds them; a slice would take all images with it
        program = torch.export.export(small, (two,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, "small.pt2")  # serve it: torch.export.load("small.pt2").module()(images)
        print(f"accuracy {accuracy:.1%}, {sum(p.numel() for p in small.parameters()):,} parameters")
ab.close()
if dist.is_initialized():
    dist.destroy_process_group()
