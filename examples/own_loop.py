"""Your own loop, whole: python examples/own_loop.py, or torchrun --nproc-per-node 4 examples/own_loop.py"""

import torch
import torch.distributed as dist
from torch import nn

import abtrain

STEPS = 600
cuda = torch.cuda.is_available()
device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
if dist.is_torchelastic_launched():  # started by torchrun; else this process trains alone
    dist.init_process_group("nccl" if cuda else "gloo")
rank = dist.get_rank() if dist.is_initialized() else 0

torch.manual_seed(0)  # the same teacher for all workers
teacher = nn.Linear(64, 10).to(device)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
torch.manual_seed(1 + rank)  # other samples for each worker


@torch.no_grad()
def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 64, device=device)
    return x, teacher(x).argmax(1)


optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
ab = abtrain.ABTraining(model, optimizer, abtrain.recipes.ab_outer(STEPS))

while not ab.finished:
    x, y = batch(64)
    loss = nn.functional.cross_entropy(ab(x), y)
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    ab.step()  # merges and changes of phase happen here

with ab.merged() as average, torch.no_grad():
    x, y = batch(10_000)
    accuracy = (average(x).argmax(1) == y).float().mean().item()
compression = ab.compression
ab.close()  # the model is a plain one again
if rank == 0:
    print(f"accuracy {accuracy:.1%}, factored {compression:.1f} : 1")
    torch.save(model.state_dict(), "model.pt")
if dist.is_initialized():
    dist.destroy_process_group()
